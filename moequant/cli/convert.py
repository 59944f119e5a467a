"""`moequant convert`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moequant.cli.common import (
    MOST,
    PRESETS,
    Calib,
    CalibTokens,
    Device,
    Effort,
    EffortOption,
    Overwrite,
    Ram,
    Seed,
    console,
    guarded,
    ram_bytes,
)

if TYPE_CHECKING:
    from moequant.commands.convert import Settings


SCHEMES = "W2A16 to W8A16, W8A8, FP8_BLOCK, FP8_DYNAMIC, MXFP4A16, NVFP4A16"


class Format(StrEnum):
    """What is written."""

    gguf = "gguf"
    safetensors = "safetensors"
    gptq = "gptq"


def convert(
    model: Annotated[Path, typer.Argument(help="Hugging Face model folder: config, safetensors, tokenizer.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="GGUF file to write, or folder.")],
    type_: Annotated[
        str | None, typer.Option("--type", "-t", metavar="TYPE", help=f"Preset of a file: {PRESETS}.")
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Largest file or folder, such as 14G, instead of a type."),
    ] = None,
    bpw: Annotated[
        float | None, typer.Option(metavar="BITS", help="Bits per weight at most, instead of a type.")
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(help="Types from a JSON file that `moequant plan -o` wrote, maybe edited.")
    ] = None,
    calib: Calib = None,
    calib_tokens: CalibTokens = 131_072,
    eval_: Annotated[
        str | None,
        typer.Option("--eval", help="Text for perplexity before and after (default: the bundled set)."),
    ] = None,
    eval_tokens: Annotated[
        int,
        typer.Option(min=0, max=MOST, help="Tokens to evaluate on, at most; 0 leaves the comparison out."),
    ] = 16_384,
    effort: EffortOption = Effort.default,
    coupled: Annotated[
        bool,
        typer.Option(help="Round each layer towards undoing what rounding the layers before it cost."),
    ] = True,
    seed: Seed = 0,
    stats: Annotated[
        Path | None,
        typer.Option(
            help="Statistics of `moequant route`, instead of a pass for them; rounding still reads text."
        ),
    ] = None,
    imatrix: Annotated[
        Path | None, typer.Option(help="An imatrix of llama.cpp (GGUF or .dat) in their place.")
    ] = None,
    imatrix_out: Annotated[
        Path | None, typer.Option(help="Also write the statistics as an imatrix for llama-quantize.")
    ] = None,
    format_: Annotated[
        Format,
        typer.Option("--format", help="gguf for llama.cpp; safetensors or gptq folders for vLLM."),
    ] = Format.gguf,
    scheme: Annotated[
        str | None,
        typer.Option(metavar="NAME", help=f"What a folder's weights are stored as: {SCHEMES}."),
    ] = None,
    bits: Annotated[
        int | None, typer.Option(help="A short word for the schemes W4A16 (default), W8A16 and their like.")
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(help="Weights that share a scale in a folder: 32, 64, 128 (default), or -1 for a row."),
    ] = None,
    quantize_attention: Annotated[
        bool | None, typer.Option("--quantize-attention", help="In a folder, round attention as well.")
    ] = None,
    tp: Annotated[
        int | None,
        typer.Option(min=1, max=1024, help="GPUs that will share each weight of a folder (default 1)."),
    ] = None,
    schemes: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES", help="With --size: schemes that a folder's weights may have, by commas."
        ),
    ] = None,
    gpu: Annotated[
        float | None,
        typer.Option(
            min=5, max=20, help="With --size: compute capability of the GPU that serves the folder."
        ),
    ] = None,
    self_check: Annotated[
        bool,
        typer.Option(help="Hold the reading of the folder against transformers' own, where it fits memory."),
    ] = True,
    ram: Ram = None,
    device: Device = "cpu",
    overwrite: Overwrite = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print every tensor's type and the file size, or its bound; read only headers."
        ),
    ] = False,
) -> None:
    """Quantize MODEL into a GGUF file for llama.cpp, or a folder for vLLM, and show what it cost."""
    from moequant.commands.convert import Settings, open_job  # torch is imported only when there is work
    from moequant.commands.convert import convert as run
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
            format=format_.value,
            scheme=scheme,
            bits=bits,
            group_size=group_size,
            quantize_attention=quantize_attention,
            tp=tp,
            schemes=schemes,
            gpu=gpu,
            self_check=self_check,
        )
    )
    if dry_run:
        job = guarded(lambda: open_job(model, settings))
        total = guarded(lambda: job.size)
        console().print(dry_run_table(job.container.checkpoint, job.plan, total, job.limit))
        return
    guarded(lambda: _announce(model, settings))
    guarded(lambda: console().print(run(model, out, settings).renderable()))


def _announce(model: Path, settings: Settings) -> None:
    """Says what effort best will take, before it starts."""
    from moequant.commands.convert import gradients, open_job

    if settings.effort != "best":
        return
    job = open_job(model, settings)
    if job.quantizes:
        typer.echo(f"moequant: {gradients(job.container.checkpoint, settings)}", err=True)
