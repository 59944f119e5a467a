"""What every command shares: option types, the console, and how an error becomes one line."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from typer.core import TyperGroup

from moequant import escape
from moequant.containers.gguf.presets import BASE_TYPES
from moequant.errors import LONGEST, MoequantError, one_line
from moequant.files import Interrupted, interruptible
from moequant.hub import HubModel, located


class Effort(StrEnum):
    """How hard the quantizers search."""

    fast = "fast"
    default = "default"
    best = "best"


T = TypeVar("T")

PIPE_WIDTH = 120

MOST = 1 << 40
"""No number of tokens is larger: sums of them must not leave 64 bits."""

PRESETS = ", ".join(BASE_TYPES)
Type = Annotated[str, typer.Option("--type", "-t", metavar="TYPE", help=f"Preset: {PRESETS}.")]
Model = Annotated[
    str,
    typer.Argument(
        help="Hugging Face model folder (config, safetensors, tokenizer), or a name of the Hub: "
        "OWNER/NAME or OWNER/NAME@REVISION."
    ),
]
Calib = Annotated[
    str | None,
    typer.Option(
        help="Calibration text: file, folder, .jsonl or Hugging Face dataset (default: the bundled set)."
    ),
]
CalibTokens = Annotated[int, typer.Option(min=1, max=MOST, help="Tokens to calibrate on, at most.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Order of the calibration text.")]
EffortOption = Annotated[
    Effort,
    typer.Option(
        help="fast: types from tables, plain search. default: types measured, rounding under Hessians. "
        "best: harder and longer."
    ),
]
Ram = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Memory to use, such as 8G: past half of it hidden states go to disk."),
]
Device = Annotated[str, typer.Option(help="Where layers run: cpu, cuda, cuda:1 …")]
CacheDir = Annotated[
    Path | None,
    typer.Option(help="Folder for downloads from the Hub (default: huggingface_hub's, HF_HOME)."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output file that exists.")]


class Commands(TyperGroup):
    """Runs a command so that no signal leaves litter, and no terminal is asked for what it cannot show."""

    def invoke(self, ctx: Any) -> Any:
        """See the class. A signal ends the process with one line and the exit code that shells expect."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors=escape.STAND_IN)
        with interruptible():
            try:
                return super().invoke(ctx)
            except Interrupted as signal:
                typer.echo(f"moequant: ended by {signal}; what was unfinished is removed", err=True)
                raise typer.Exit(signal.exit_code) from None


def console() -> Console:
    """As wide as the terminal; wide enough for every table when the output goes to a file or a pipe."""
    made = Console()
    return made if made.is_terminal else Console(width=PIPE_WIDTH)


def guarded(action: Callable[[], T]) -> T:
    """The action's result; one line on stderr and exit code 1 for an error raised on purpose, and for one of
    the operating system that nobody expected there."""
    try:
        return action()
    except MoequantError as error:
        typer.echo(f"moequant: {one_line(escape.plain(str(error)), LONGEST)}", err=True)
        raise typer.Exit(1) from None
    except OSError as error:  # a name that no file can have, a file that vanished, a disk that fails
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        typer.echo(f"moequant: {one_line(escape.plain(what), LONGEST)}", err=True)
        raise typer.Exit(1) from None


def place(model: str, cache: Path | None = None) -> Path | HubModel:
    """What was typed for a model: a path, or a name of the Hub that keeps its files in `cache`."""
    return guarded(lambda: located(model, cache))


def local(place: Path | HubModel | None) -> Path | None:
    """A path that a run reads; None for what lies on the Hub."""
    return place if isinstance(place, Path) else None


def ram_bytes(size: str | None) -> int | None:
    """Bytes of `--ram`; PlanError for what is no size."""
    from moequant.plan import parse_size

    return None if size is None else parse_size(size)
