"""`moequant convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moequant.cli.common import (
    Device,
    Effort,
    EffortOption,
    Overwrite,
    Ram,
    Type,
    console,
    guarded,
    ram_bytes,
)


def convert(
    model: Annotated[Path, typer.Argument(help="Hugging Face model folder: config, safetensors, tokenizer.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="GGUF file to write.")],
    type_: Type = "Q4_K_M",
    size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Largest file, such as 14G, instead of a type."),
    ] = None,
    bpw: Annotated[
        float | None, typer.Option(metavar="BITS", help="Bits per weight at most, instead of a type.")
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(help="Types from a JSON file that `moequant plan -o` wrote, maybe edited.")
    ] = None,
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
    coupled: Annotated[
        bool,
        typer.Option(help="Round each layer towards undoing what rounding the layers before it cost."),
    ] = True,
    seed: Annotated[int, typer.Option(help="Order of the calibration text.")] = 0,
    stats: Annotated[
        Path | None, typer.Option(help="Statistics of `moequant route`, instead of a pass for them.")
    ] = None,
    imatrix: Annotated[
        Path | None, typer.Option(help="An imatrix of llama.cpp (GGUF or .dat), instead of such a pass.")
    ] = None,
    imatrix_out: Annotated[
        Path | None, typer.Option(help="Also write the statistics as an imatrix for llama-quantize.")
    ] = None,
    ram: Ram = None,
    device: Device = "cpu",
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

    settings = guarded(
        lambda: Settings(
            type=type_,
            calib=calib,
            calib_tokens=calib_tokens,
            eval=eval_,
            eval_tokens=eval_tokens,
            effort=effort.value,
            seed=seed,
            size=size,
            bpw=bpw,
            plan=plan,
            coupled=coupled,
            stats=stats,
            imatrix=imatrix,
            imatrix_out=imatrix_out,
            ram=ram_bytes(ram),
            device=device,
            overwrite=overwrite,
        )
    )
    out_console = console()
    if dry_run:
        opened = guarded(lambda: open_model(model, settings))
        out_console.print(dry_run_table(opened.checkpoint, opened.plan, opened.file_bytes, opened.limit(settings)))
        return
    out_console.print(guarded(lambda: run(model, out, settings)).renderable())
