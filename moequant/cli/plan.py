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
    Device,
    Effort,
    EffortOption,
    Format,
    Overwrite,
    Ram,
    Seed,
    Source,
    TensorType,
    guarded,
    ram_bytes,
    source,
    tell,
)


def plan(
    model: Source,
    sizes: Annotated[
        str | None,
        typer.Option(metavar="SIZE,…", help="Sizes to plan for, such as 10G,12G,14GiB."),
    ] = None,
    bpw: Annotated[
        str | None, typer.Option(metavar="BITS,…", help="Bits per weight to plan for, such as 3.5,4.5.")
    ] = None,
    type_: Annotated[
        str | None,
        typer.Option(
            "--type",
            "-t",
            metavar="TYPE,…",
            help="Presets to plan for: the sizes of llama.cpp's files of those names.",
        ),
    ] = None,
    tensor_type: TensorType = None,
    format_: Annotated[
        Format,
        typer.Option("--format", help="A GGUF file, or a folder for vLLM with a scheme for each layer."),
    ] = Format.gguf,
    schemes: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Schemes that a folder's weights may have, by commas."),
    ] = None,
    gpu: Annotated[
        float | None,
        typer.Option(min=5, max=20, help="Compute capability of the GPU that serves the folder."),
    ] = None,
    tp: Annotated[
        int | None,
        typer.Option(min=1, max=1024, help="How many GPUs will share each weight of a folder."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write the plan as JSON. You may edit it; convert --plan takes it."),
    ] = None,
    curve: Annotated[
        Path | None, typer.Option(help="Draw loss against size: a .png, .svg or .pdf file.")
    ] = None,
    stats: Annotated[
        Path | None,
        typer.Option(metavar="STATS", help="Statistics that `moequant route -o` wrote, instead of a pass."),
    ] = None,
    calib: Calib = None,
    calib_tokens: CalibTokens = 131_072,
    probes: Annotated[
        bool,
        typer.Option(
            "--probes/--no-probes",
            help="Measure what each type costs this model, or take tables of other models.",
        ),
    ] = True,
    effort: EffortOption = Effort.default,
    seed: Seed = 0,
    ram: Ram = None,
    device: Device = "cpu",
    config: Config = None,
    cache_dir: CacheDir = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Show what MODEL costs at every size of a file or folder, and write the best plan for one."""
    from moequant.commands.plan import (  # torch only when there is work
        Outputs,
        PlanSettings,
    )
    from moequant.forward.resources import Resources
    from moequant.library import plan as run
    from moequant.ranks import here

    resources = guarded(lambda: Resources(ram=ram_bytes(ram), device=device, ranks=here()))
    pins = tuple(tensor_type or ())
    settings = guarded(
        lambda: PlanSettings(
            calib,
            calib_tokens,
            stats,
            probes,
            effort.value,
            seed,
            pins,
            sizes,
            bpw,
            type_,
            format_.value,
            schemes,
            gpu,
            tp,
            resources,
        )
    )
    outputs = Outputs(out, curve, overwrite)
    tell(guarded(lambda: run(source(model, config, cache_dir), settings, outputs)), as_json)
