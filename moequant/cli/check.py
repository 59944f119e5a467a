"""`moequant check`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from moequant.cli.common import MOST, CacheDir, Overwrite, console, guarded, local, place
from moequant.cli.output import document


class CheckDevice(StrEnum):
    """Where products run."""

    cpu = "cpu"
    cuda = "cuda"
    interpreter = "interpreter"


def check(
    out: Annotated[
        str,
        typer.Argument(
            help="GGUF file, folder of int4/int8 safetensors, or a name of the Hub: OWNER/NAME[:FILE.gguf]."
        ),
    ],
    baseline: Annotated[
        str | None,
        typer.Option(help="Model that it was made from, folder or name: errors per expert, routing."),
    ] = None,
    device: Annotated[
        CheckDevice | None,
        typer.Option(help="Where products run (default: cuda if there is one; interpreter: Triton's own)."),
    ] = None,
    sample: Annotated[
        int | None, typer.Option(min=1, help="Check so many tensors, spread over the file (default: all).")
    ] = None,
    calib: Annotated[
        str | None,
        typer.Option(help="Text for real activations: file, folder, .jsonl or dataset (default: bundled)."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=512, max=MOST, help="Tokens of that text.")] = 2048,
    speed: Annotated[bool, typer.Option("--speed", help="Time the kernels too (needs a GPU).")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write everything found as JSON.")
    ] = None,
    cache_dir: CacheDir = None,
    overwrite: Overwrite = False,
) -> None:
    """Check the packed bytes: decoders, GPU products, every expert against the model. Exits 1 if not."""
    from moequant.commands.check import CheckSettings  # torch is imported only when there is work
    from moequant.commands.check import check as run
    from moequant.files import atomic, claim
    from moequant.report.check import check_json, check_report

    what, base = place(out, cache_dir), None if baseline is None else place(baseline, cache_dir)
    settings = CheckSettings(base, device.value if device else None, sample, calib, tokens, speed)

    def work() -> bool:
        with claim(json_file, overwrite=overwrite, inputs=(local(what), local(base), calib)):
            report = run(what, settings)
            if json_file is not None:
                with atomic(json_file) as partial:
                    text = document("check", check_json(report))
                    partial.write_text(text, encoding="utf-8", errors="backslashreplace")
            console().print(check_report(report))
            return report.holds

    if not guarded(work):
        raise typer.Exit(1)
