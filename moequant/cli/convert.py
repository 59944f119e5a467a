"""`moequant convert`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import RenderableType

from moequant.cli.common import (
    Calib,
    CalibTokens,
    Device,
    Effort,
    EffortOption,
    Overwrite,
    Ram,
    Seed,
    Type,
    console,
    guarded,
    ram_bytes,
)
from moequant.errors import PlanError

if TYPE_CHECKING:
    from moequant.commands.convert import Settings


class Format(StrEnum):
    """What is written."""

    gguf = "gguf"
    safetensors = "safetensors"
    gptq = "gptq"


@dataclass(frozen=True, slots=True)
class Folder:
    """The options of a folder, as they were given."""

    format: Format
    bits: int
    group_size: int
    quantize_attention: bool
    tp: int


def convert(
    model: Annotated[Path, typer.Argument(help="Hugging Face model folder: config, safetensors, tokenizer.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="GGUF file to write, or folder.")],
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
    calib: Calib = None,
    calib_tokens: CalibTokens = 131_072,
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
    bits: Annotated[int, typer.Option(help="Bits of a folder's weights: 4 or 8.")] = 4,
    group_size: Annotated[
        int, typer.Option(help="Weights that share a scale in a folder: 32, 64, 128, or -1 for a row.")
    ] = 128,
    quantize_attention: Annotated[
        bool, typer.Option("--quantize-attention", help="In a folder, round attention as well.")
    ] = False,
    tp: Annotated[int, typer.Option(min=1, help="GPUs that will share each weight of a folder.")] = 1,
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
    from moequant.commands.convert import Settings, open_model  # torch is imported only when there is work
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
        )
    )
    if not dry_run:
        guarded(lambda: _announce(model, settings, format_))
    if format_ is not Format.gguf:
        folder = Folder(format_, bits, group_size, quantize_attention, tp)
        console().print(guarded(lambda: _convert_folder(model, out, settings, folder, dry_run)))
        return
    out_console = console()
    if dry_run:
        opened = guarded(lambda: open_model(model, settings))
        limit = opened.limit(settings)
        out_console.print(dry_run_table(opened.checkpoint, opened.plan, opened.file_bytes, limit))
        return
    out_console.print(guarded(lambda: run(model, out, settings)).renderable())


def _announce(model: Path, settings: Settings, format_: Format) -> None:
    """Says what effort best will take, before it starts."""
    from moequant.checkpoint import open_checkpoint
    from moequant.commands.convert import gradients, open_model

    if settings.effort != "best" or (format_ is Format.gguf and not open_model(model, settings).quantizes):
        return
    typer.echo(f"moequant: {gradients(open_checkpoint(model), settings)}", err=True)


def _convert_folder(
    model: Path, out: Path, settings: Settings, options: Folder, dry_run: bool
) -> RenderableType:
    """What the command prints for a folder."""
    from moequant.checkpoint import open_checkpoint
    from moequant.commands.convert_folder import convert_folder
    from moequant.containers.folders.plan import FolderSettings, group_plan
    from moequant.containers.folders.write import folder_bytes
    from moequant.report.dry_run import dry_run_table

    layout = FolderSettings(
        layout="gptq" if options.format is Format.gptq else "compressed-tensors",
        bits=options.bits,
        group_size=options.group_size,
        quantize_attention=options.quantize_attention,
        tp=options.tp,
    )
    if settings.size is not None or settings.bpw is not None or settings.plan is not None:
        raise PlanError(f"--format {options.format}: --bits and --group-size say how large it is")
    if not dry_run:
        return convert_folder(model, out, settings, layout).renderable()
    checkpoint = open_checkpoint(model)
    plan = group_plan(checkpoint, layout)
    return dry_run_table(checkpoint, plan, folder_bytes(checkpoint, plan, layout))
