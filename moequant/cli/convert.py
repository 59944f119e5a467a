"""`moequant convert`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moequant.cli.common import (
    MOST,
    PRESETS,
    AsJson,
    CacheDir,
    Calib,
    CalibTokens,
    Config,
    Details,
    Device,
    Effort,
    EffortOption,
    Overwrite,
    Ram,
    Seed,
    Source,
    TensorType,
    console,
    emit,
    guarded,
    ram_bytes,
    source,
)

if TYPE_CHECKING:
    from moequant.commands.convert import Settings
    from moequant.hub import GgufModel, HubModel


SCHEMES = "W2A16 to W8A16, W8A8, FP8_BLOCK, FP8_DYNAMIC, FP8, MXFP4A16, NVFP4A16, NVFP4"


class Format(StrEnum):
    """What is written."""

    gguf = "gguf"
    safetensors = "safetensors"
    gptq = "gptq"
    awq = "awq"


def convert(
    model: Source,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            metavar="PATH",
            help="GGUF file or folder to write. For several sizes: a folder, in which files are named "
            "MODEL-SIZE.gguf, or a name with {type} in it, such as out-{type}.gguf.",
        ),
    ],
    type_: Annotated[
        str | None,
        typer.Option(
            "--type",
            "-t",
            metavar="TYPE,…",
            help=f"Preset, or several with commas between them, a file for each: {PRESETS}.",
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE,…",
            help="Largest size of the file or folder, such as 14G or 10G,12G,14G. Instead of a type.",
        ),
    ] = None,
    bpw: Annotated[
        str | None, typer.Option(metavar="BITS,…", help="At most so many bits per weight. Instead of a type.")
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(help="Types from a JSON file that `moequant plan -o` wrote. You may edit it."),
    ] = None,
    tensor_type: TensorType = None,
    calib: Calib = None,
    calib_tokens: CalibTokens = 131_072,
    eval_: Annotated[
        str | None,
        typer.Option("--eval", help="Text to compare with the original on (default: the bundled set)."),
    ] = None,
    eval_tokens: Annotated[
        int,
        typer.Option(
            min=0, max=MOST, help="At most so many tokens of that text; 0 leaves the comparison out."
        ),
    ] = 16_384,
    effort: EffortOption = Effort.default,
    coupled: Annotated[
        bool,
        typer.Option(help="Round each layer so that it makes up for the rounding of the layers before it."),
    ] = True,
    seed: Seed = 0,
    stats: Annotated[
        Path | None,
        typer.Option(help="Statistics that `moequant route -o` wrote. Rounding still reads the text."),
    ] = None,
    imatrix: Annotated[
        Path | None, typer.Option(help="Importance from an imatrix of llama.cpp (GGUF or .dat).")
    ] = None,
    imatrix_out: Annotated[
        Path | None, typer.Option(help="Also write the statistics as an imatrix for llama-quantize.")
    ] = None,
    card: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE|FOLDER",
            help="Also write a README.md for the Hugging Face Hub: files, their loss, how to run them.",
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Also write the report as a page: one file with maps of all experts.")
    ] = None,
    format_: Annotated[
        Format,
        typer.Option(
            "--format", help="gguf: a file for llama.cpp. safetensors, gptq, awq: a folder for vLLM."
        ),
    ] = Format.gguf,
    scheme: Annotated[
        str | None,
        typer.Option(metavar="NAME", help=f"For folders, how weights are stored: {SCHEMES}."),
    ] = None,
    bits: Annotated[
        int | None, typer.Option(help="For folders: --bits 4 is short for --scheme W4A16, the default.")
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(help="For folders: weights that share a scale, 32, 64, 128 (default), or -1 for a row."),
    ] = None,
    quantize_attention: Annotated[
        bool | None, typer.Option("--quantize-attention", help="For folders: quantize attention as well.")
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
    split_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Cut the output into files with at most so many bytes of weights, such as 40G: "
            "NAME-00001-of-00003.gguf and so on.",
        ),
    ] = None,
    self_check: Annotated[
        bool,
        typer.Option(
            help="Compare logits with transformers on the original folder, as far as memory allows."
        ),
    ] = True,
    mtp: Annotated[
        bool, typer.Option(help="Keep MTP layers, with which llama.cpp drafts tokens ahead.")
    ] = True,
    ram: Ram = None,
    device: Device = "cpu",
    details: Details = False,
    config: Config = None,
    cache_dir: CacheDir = None,
    stream: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Keep at most so much of a model from the Hub on disk, such as 200G. Later passes fetch it "
            "again.",
        ),
    ] = None,
    overwrite: Overwrite = False,
    fresh: Annotated[
        bool,
        typer.Option(
            "--fresh",
            help="Start from the beginning, instead of continuing a run that was killed.",
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print the type of every tensor and the size of the file, from headers alone."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Quantize MODEL into a GGUF file for llama.cpp, or a folder for vLLM, and show what was lost.

    Several processes share the work with the same result: torchrun --nproc-per-node N -m moequant convert …
    """
    from moequant.commands.convert import (  # torch is imported only when there is work
        Settings,
        convert_all,
        planned,
    )
    from moequant.commands.job import notes
    from moequant.report.conversion import next_steps
    from moequant.report.dry_run import DryRun, dry_run_table
    from moequant.report.machine import dry_run_json

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
            tensor_type=tuple(tensor_type or ()),
            coupled=coupled,
            stats=stats,
            imatrix=imatrix,
            imatrix_out=imatrix_out,
            card=card,
            html=html,
            ram=ram_bytes(ram),
            stream=ram_bytes(stream),
            device=device,
            overwrite=overwrite,
            fresh=fresh,
            format=format_.value,
            scheme=scheme,
            bits=bits,
            group_size=group_size,
            split_size=split_size,
            quantize_attention=quantize_attention,
            tp=tp,
            schemes=schemes,
            gpu=gpu,
            self_check=self_check,
            mtp=mtp,
        )
    )
    given = source(model, config, cache_dir)
    if dry_run:
        files = [
            DryRun(
                job.container.checkpoint,
                job.plan,
                guarded(lambda: job.parts(path)),  # noqa: B023  called at once
                job.limit,
                notes(job),
            )
            for job, path in guarded(lambda: planned(given, out, settings))
        ]
        if as_json:
            emit("convert", dry_run_json(files))
        else:
            for each in files:
                console().print(dry_run_table(each))
        return
    guarded(lambda: _announce(given, settings))
    made = guarded(lambda: convert_all(given, out, settings))
    if as_json:
        typer.echo(made.to_json())
        return
    shown = console()
    shown.print(made.renderable(details))
    shown.print(next_steps(made, model, card), soft_wrap=True)  # a command is copied whole


def _announce(model: Path | HubModel | GgufModel, settings: Settings) -> None:
    """Says what effort best will take, before it starts."""
    from moequant.commands.convert import gradients, open_jobs

    if settings.effort != "best":
        return
    job, *others = open_jobs(model, settings)
    if any(each.quantizes for each in (job, *others)):
        typer.echo(f"moequant: {gradients(job.container.checkpoint, settings)}", err=True)
