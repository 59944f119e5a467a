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
    console,
    emit,
    guarded,
    local,
    source,
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
        claimed,
        survey,
        write,
    )
    from moequant.commands.plan import budgets as budgets_of
    from moequant.report.curve import curve_tables
    from moequant.report.machine import survey_json

    settings = PlanSettings(calib, calib_tokens, stats, probes, effort.value, seed, tuple(tensor_type or ()))
    outputs = Outputs(out, curve, overwrite)
    wanted = guarded(lambda: budgets_of(sizes, bpw, type_))

    given = source(model, config, cache_dir)

    def work() -> None:
        with claimed(outputs, local(given), calib, stats):
            found = survey(given, settings, wanted, outputs)
            if as_json:
                emit("plan", survey_json(found.curve))
            else:
                console().print(curve_tables(found.curve))
            write(found, outputs)

    guarded(work)
