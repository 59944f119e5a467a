"""`moequant route`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moequant.cli.common import (
    MOST,
    AsJson,
    CacheDir,
    Calib,
    CalibTokens,
    Config,
    Device,
    Overwrite,
    Ram,
    Seed,
    Source,
    guarded,
    ram_bytes,
    source,
    tell,
)


def route(
    model: Source,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the statistics to this .safetensors file.")
    ] = None,
    calib: Calib = None,
    calib_tokens: CalibTokens = 131_072,
    seed: Seed = 0,
    min_tokens_per_expert: Annotated[
        float,
        typer.Option(
            min=0.0,
            metavar="R",
            help="Draw more text, chosen by domain, until every expert saw R times its fair share "
            "of --calib-tokens; 0 draws none.",
        ),
    ] = 0.0,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MOST,
            help="At most so many tokens with --min-tokens-per-expert (default: 4 x --calib-tokens).",
        ),
    ] = None,
    merge: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="STATS",
            help="Add statistics that were made before, of the same model; may be repeated. "
            "Without --calib no text is routed.",
        ),
    ] = None,
    imatrix_out: Annotated[
        Path | None, typer.Option(help="Write a GGUF importance matrix, for llama-quantize --imatrix.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Draw the tokens of every expert: a .png, .svg or .pdf file.")
    ] = None,
    as_json: AsJson = False,
    ram: Ram = None,
    device: Device = "cpu",
    config: Config = None,
    cache_dir: CacheDir = None,
    overwrite: Overwrite = False,
) -> None:
    """Route text through MODEL and show what every expert saw.

    With --out finished layers are kept beside it: run the same command again after it was killed.
    """
    from moequant.commands.route import Outputs, RouteSettings  # torch only when there is work
    from moequant.forward.resources import Resources
    from moequant.library import route as run
    from moequant.ranks import here

    resources = guarded(lambda: Resources(ram=ram_bytes(ram), device=device, ranks=here()))
    settings = guarded(
        lambda: RouteSettings(
            calib, calib_tokens, seed, min_tokens_per_expert, max_tokens, tuple(merge or ()), resources
        )
    )
    outputs = Outputs(out, imatrix_out, picture, overwrite)
    tell(guarded(lambda: run(source(model, config, cache_dir), settings, outputs)), as_json)
