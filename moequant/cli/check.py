"""`moequant check`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from moequant.cli.common import MOST, AsJson, CacheDir, guarded, place, tell


class CheckDevice(StrEnum):
    """Where products run."""

    cpu = "cpu"
    cuda = "cuda"
    interpreter = "interpreter"


def check(
    out: Annotated[
        str,
        typer.Argument(
            help="GGUF file, quantized safetensors folder, or a name on the Hub: OWNER/NAME[:FILE.gguf]."
        ),
    ],
    baseline: Annotated[
        str | None,
        typer.Option(
            help="The model that it was made from, folder or name: adds every expert's error, and routing."
        ),
    ] = None,
    device: Annotated[
        CheckDevice | None,
        typer.Option(
            help="Where the kernels run. Default: cuda if there is one, else cpu; interpreter is Triton's."
        ),
    ] = None,
    sample: Annotated[
        int | None,
        typer.Option(min=1, help="Check only so many tensors, spread over the file (default: all)."),
    ] = None,
    calib: Annotated[
        str | None,
        typer.Option(
            help="Text to run through the model: file, folder, .jsonl or dataset (default: bundled)."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=512, max=MOST, help="Tokens of that text to use.")] = 2048,
    speed: Annotated[bool, typer.Option("--speed", help="Time the kernels too (needs a GPU).")] = False,
    cache_dir: CacheDir = None,
    as_json: AsJson = False,
) -> None:
    """Check a file: checksums, decoders, kernels, every expert against the model. Exits 1 if one fails."""
    from moequant.commands.check import CheckSettings  # torch is imported only when there is work
    from moequant.library import check as run

    what, base = place(out, cache_dir), None if baseline is None else place(baseline, cache_dir)
    settings = CheckSettings(base, device.value if device else None, sample, calib, tokens, speed)

    result = guarded(lambda: run(what, settings))
    tell(result, as_json)
    if not result.found.holds:
        raise typer.Exit(1)
