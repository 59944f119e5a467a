"""`moequant convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moequant.cli.common import Effort, EffortOption, Overwrite, Type, console, guarded


def convert(
    model: Annotated[Path, typer.Argument(help="Hugging Face model folder: config, safetensors, tokenizer.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="GGUF file to write.")],
    type_: Type = "Q4_K_M",
    calib: Annotated[
        str | None,
        typer.Option(
            help="Calibration text: file, folder, .jsonl or Hugging Face dataset (default: the bundled set)."
        ),
    ] = None,
    calib_tokens: Annotated[int, typer.Option(min=1, help="Tokens to calibrate on, at most.")] = 131_072,
    eval_: Annotated[
        str | None,
        typer.Option("--eval", help="Text for perplexity before and after (default: the bundled set)."),
    ] = None,
    eval_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens to evaluate on, at most; 0 leaves the comparison out.")
    ] = 16_384,
    effort: EffortOption = Effort.default,
    seed: Annotated[int, typer.Option(help="Order of the calibration text.")] = 0,
    overwrite: Overwrite = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print every tensor's type and the exact file size; read only headers."
        ),
    ] = False,
) -> None:
    """Quantize MODEL into a GGUF file for llama.cpp and show what it cost."""
    from moequant.conversion import Settings, open_model  # torch is imported only when there is work
    from moequant.conversion import convert as run
    from moequant.report.dry_run import dry_run_table

    settings = Settings(
        type_, calib, calib_tokens, eval_, eval_tokens, effort.value, seed=seed, overwrite=overwrite
    )
    out_console = console()
    if dry_run:
        opened = guarded(lambda: open_model(model, settings))
        out_console.print(dry_run_table(opened.checkpoint, opened.plan, opened.file_bytes))
        return
    out_console.print(guarded(lambda: run(model, out, settings)).renderable())
