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


SCHEMES = "W2A16 to W8A16, W8A8, FP8_BLOCK, FP8_DYNAMIC, MXFP4A16, NVFP4A16"


class Format(StrEnum):
    """What is written."""

    gguf = "gguf"
    safetensors = "safetensors"
    gptq = "gptq"


def convert(
    model: Source,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            metavar="PATH",
            help="GGUF file to write, or folder. For several sizes a folder (its files are named "
            "MODEL-SIZE.gguf), or a name with {type} in it, such as out-{type}.gguf.",
        ),
    ],
    type_: Annotated[
        str | None,
        typer.Option(
            "--type",
            "-t",
            metavar="TYPE,…",
            help=f"Preset of a file, or several, a file for each: {PRESETS}.",
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE,…", help="Largest file or folder, such as 14G or 10G,12G,14G, instead of a type."
        ),
    ] = None,
    bpw: Annotated[
        str | None, typer.Option(metavar="BITS,…", help="Bits per weight at most, instead of a type.")
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(help="Types from a JSON file that `moequant plan -o` wrote, maybe edited.")
    ] = None,
    tensor_type: TensorType = None,
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
    card: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE|FOLDER",
            help="Also write a README.md for the Hugging Face Hub: files, what they lost, how to run them.",
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Page to write: verdict, figures, maps of all experts; one file.")
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
    split_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Cut the output into files of at most so many bytes of weights, such as 40G; "
            "NAME.gguf becomes NAME-00001-of-00003.gguf and so on.",
        ),
    ] = None,
    self_check: Annotated[
        bool,
        typer.Option(help="Hold the reading of the folder against transformers' own, where it fits memory."),
    ] = True,
    mtp: Annotated[
        bool, typer.Option(help="Keep layers that predict the token after the next, for drafting.")
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
            help="Keep at most so much of a model of the Hub on disk, such as 200G, and fetch again what a "
            "later pass reads.",
        ),
    ] = None,
    overwrite: Overwrite = False,
    fresh: Annotated[
        bool,
        typer.Option(
            "--fresh",
            help="Begin again, instead of going on where the same command was killed or ran out of disk.",
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print every tensor's type and the file size, or its bound; read only headers."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Quantize MODEL into a GGUF file for llama.cpp, or a folder for vLLM, and show what it cost."""
    from moequant.commands.convert import (  # torch is imported only when there is work
        Settings,
        convert_all,
        planned,
    )
    from moequant.report.conversion import next_steps
    from moequant.report.dry_run import dry_run_table
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
            (job.container.checkpoint, job.plan, guarded(lambda: job.parts(path)), job.limit)  # noqa: B023  called at once
            for job, path in guarded(lambda: planned(given, out, settings))
        ]
        if as_json:
            emit("convert", dry_run_json(files))
        else:
            for each in files:
                console().print(dry_run_table(*each))
        return
    guarded(lambda: _announce(given, settings))
    made = guarded(lambda: convert_all(given, out, settings))
    if as_json:
        typer.echo(made.to_json())
        return
    shown = console()
    shown.print(made.renderable(details))
    shown.print(next_steps(made, model), soft_wrap=True)  # a command is copied whole


def _announce(model: Path | HubModel | GgufModel, settings: Settings) -> None:
    """Says what effort best will take, before it starts."""
    from moequant.commands.convert import gradients, open_jobs

    if settings.effort != "best":
        return
    job, *others = open_jobs(model, settings)
    if any(each.quantizes for each in (job, *others)):
        typer.echo(f"moequant: {gradients(job.container.checkpoint, settings)}", err=True)
