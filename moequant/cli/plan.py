"""`moequant plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moequant.cli.common import (
    AsJson,
    CacheDir,
    Calib,
    CalibTokens,
    Config,
    Effort,
    EffortOption,
    Overwrite,
    Seed,
    Source,
    TensorType,
    guarded,
    source,
    tell,
)


def plan(
    model: Source,
    sizes: Annotated[
        str | None,
        typer.Option(metavar="SIZE,…", help="File sizes to plan for, such as 10G,12G,14GiB."),
    ] = None,
    bpw: Annotated[
        str | None, typer.Option(metavar="BITS,…", help="Plan for so many bits per weight.")
    ] = None,
    type_: Annotated[
        str | None,
        typer.Option("--type", "-t", metavar="TYPE,…", help="Plan for the size of llama.cpp's preset."),
    ] = None,
    tensor_type: TensorType = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write the plan as JSON, to read, edit and give to convert --plan."),
    ] = None,
    curve: Annotated[
        Path | None, typer.Option(help="Draw the size/quality curve: .png, .svg or .pdf.")
    ] = None,
    stats: Annotated[
        Path | None,
        typer.Option(metavar="STATS", help="Statistics that moequant route saved: no calibration pass."),
    ] = None,
    calib: Calib = None,
    calib_tokens: CalibTokens = 131_072,
    probes: Annotated[
        bool,
        typer.Option(
            "--probes/--no-probes",
            help="Measure what each weight costs in KL divergence, or take other models' sensitivities.",
        ),
    ] = True,
    effort: EffortOption = Effort.default,
    seed: Seed = 0,
    config: Config = None,
    cache_dir: CacheDir = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Show what MODEL costs at every file size, and write the best plan for one."""
    from moequant.commands.plan import (  # torch only when there is work
        Outputs,
        PlanSettings,
    )
    from moequant.library import plan as run

    pins = tuple(tensor_type or ())
    settings = guarded(
        lambda: PlanSettings(calib, calib_tokens, stats, probes, effort.value, seed, pins, sizes, bpw, type_)
    )
    outputs = Outputs(out, curve, overwrite)
    tell(guarded(lambda: run(source(model, config, cache_dir), settings, outputs)), as_json)
