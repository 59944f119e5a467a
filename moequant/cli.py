"""The command line: translates arguments, prints, exits; nothing else."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.console import Console

import moequant
from moequant.errors import MoequantError
from moequant.presets import BASE_TYPES

app = typer.Typer(
    name="moequant",
    help="Quantize mixture-of-experts models: every expert measured, packed and checked.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Effort(StrEnum):
    """How hard the quantizers search."""

    fast = "fast"
    default = "default"
    best = "best"


T = TypeVar("T")

PIPE_WIDTH = 120

Type = Annotated[str, typer.Option("--type", "-t", metavar="TYPE", help=f"Preset: {', '.join(BASE_TYPES)}.")]
EffortOption = Annotated[Effort, typer.Option(help="How hard to search for scales and codes.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output file that exists.")]


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Quantize mixture-of-experts models: every expert measured, packed and checked."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    if version:
        typer.echo(f"moequant {moequant.__version__}")
        raise typer.Exit


@app.command()
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
    console = _console()
    if dry_run:
        opened = guarded(lambda: open_model(model, settings))
        console.print(dry_run_table(opened.checkpoint, opened.plan, opened.file_bytes))
        return
    console.print(guarded(lambda: run(model, out, settings)).renderable())


@app.command()
def demo(
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Keep the GGUF file under this name.")
    ] = None,
    type_: Type = "Q4_K_M",
    effort: EffortOption = Effort.default,
    overwrite: Overwrite = False,
) -> None:
    """Convert the tiny trained MoE that ships with moequant and print the report."""
    from moequant import bundled
    from moequant.conversion import Settings
    from moequant.conversion import convert as run

    # A model this small has nothing more to learn from the rest of the bundled text.
    settings = Settings(type_, calib_tokens=32_768, effort=effort.value, overwrite=overwrite)
    with tempfile.TemporaryDirectory(prefix="moequant-") as folder:
        target = out or Path(folder) / f"demo-{type_}.gguf"
        report = guarded(lambda: run(bundled.path("demo"), target, settings))
    _console().print(report.renderable())
    if out is None:
        typer.echo("The file was made in a temporary folder and is gone; -o FILE keeps it.")


def _console() -> Console:
    """As wide as the terminal; wide enough for every table when the output goes to a file or a pipe."""
    console = Console()
    return console if console.is_terminal else Console(width=PIPE_WIDTH)


def guarded(action: Callable[[], T]) -> T:
    """The action's result; one line on stderr and exit code 1 for an error raised on purpose."""
    try:
        return action()
    except MoequantError as error:
        typer.echo(f"moequant: {error}", err=True)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    app()
