"""What every command shares: option types, the console, and how an error becomes one line."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from moequant import escape
from moequant.cli.output import AsJson, console, emit, guarded, silent, tell
from moequant.containers.gguf.presets import BASE_TYPES
from moequant.errors import MEMORY_ERRORS, MoequantError, PlanError, RankError, lacks_memory, one_line
from moequant.files import Interrupted, interruptible
from moequant.hub import GgufModel, HubModel, located
from moequant.ranks import Ranks, joined

__all__ = ["AsJson", "Commands", "console", "emit", "guarded", "tell"]


class Format(StrEnum):
    """GGUF files for llama.cpp, or folders for vLLM."""

    gguf = "gguf"
    safetensors = "safetensors"


class Effort(StrEnum):
    """How hard the quantizers search."""

    fast = "fast"
    default = "default"
    best = "best"


UsageError: type[Any] = typer.BadParameter.__mro__[1]
"""Whatever is wrong with what was typed. Typer has a click of its own, and does not name this class."""

_TYPED = "moequant.typed"

MOST = 1 << 40
"""No number of tokens is larger: sums of them must not leave 64 bits."""

PRESETS = ", ".join(BASE_TYPES)
Type = Annotated[str, typer.Option("--type", "-t", metavar="TYPE", help=f"Preset: {PRESETS}.")]
Model = Annotated[
    str,
    typer.Argument(
        help="Hugging Face model folder (config, safetensors, tokenizer), or a name on the Hub: "
        "OWNER/NAME or OWNER/NAME@REVISION."
    ),
]
Source = Annotated[
    str,
    typer.Argument(
        help="Hugging Face model folder (config, safetensors, tokenizer), a name on the Hub (OWNER/NAME or "
        "OWNER/NAME@REVISION), or a GGUF file."
    ),
]
Config = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER|NAME",
        help="When MODEL is a GGUF file: the folder, or name on the Hub, with the original's config.json and "
        "tokenizer (default: beside the file).",
    ),
]
Calib = Annotated[
    str | None,
    typer.Option(
        help="Calibration text: file, folder, .jsonl or Hugging Face dataset (default: the bundled set)."
    ),
]
CalibTokens = Annotated[
    int, typer.Option(min=1, max=MOST, help="At most so many tokens of calibration text.")
]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Order of the calibration text.")]
EffortOption = Annotated[
    Effort,
    typer.Option(
        help="fast: types from tables, plain search. default: types measured on this model, rounding under "
        "Hessians. best: searches longer, and needs the whole model in memory."
    ),
]
Ram = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Memory to use, such as 8G. Above half of it, hidden states go to disk, and a layer's experts "
        "are read some at a time.",
    ),
]
Device = Annotated[str, typer.Option(help="Where the model's layers run: cpu, cuda, cuda:1 …")]
Details = Annotated[
    bool,
    typer.Option(
        "--details", help="Also show tables: types, what each layer's experts saw and lost, time and memory."
    ),
]
TensorType = Annotated[
    list[str] | None,
    typer.Option(
        "--tensor-type",
        metavar="REGEX=TYPE",
        help="Fix the type of all weights whose name (ours or the file's) contains the pattern, such as "
        "experts.down=Q6_K. May be repeated; the first match counts. The other weights share the rest of the "
        "budget.",
    ),
]
CacheDir = Annotated[
    Path | None,
    typer.Option(help="Folder for downloads from the Hub (default: huggingface_hub's, HF_HOME)."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output file that exists.")]


class Commands(TyperGroup):
    """Runs a command so that no signal leaves litter, and no terminal is asked for what it cannot show."""

    def main(self, *given: Any, **named: Any) -> Any:
        """See the class. Of several processes that torchrun started, the first runs the command."""
        try:
            with joined() as ranks:
                if ranks.first:
                    return super().main(*given, **named)
                return helped(ranks)
        except RankError as error:
            typer.echo(f"moequant: {error}", err=True)
            raise SystemExit(1) from None

    def make_context(self, info_name: str | None, args: list[str], *given: Any, **named: Any) -> Any:
        """See the class. What was typed is kept for `invoke`, which has to know of --json."""
        typed = list(args)
        with _usage(typed):
            made = super().make_context(info_name, args, *given, **named)
        made.meta[_TYPED] = typed
        return made

    def invoke(self, ctx: Any) -> Any:
        """See the class. A signal ends the process with one line and the exit code that shells expect."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors=escape.STAND_IN)
        with interruptible():
            try:
                typed = ctx.meta[_TYPED]
                with _usage(typed, next((word for word in typed if word in self.commands), "")):
                    return super().invoke(ctx)
            except Interrupted as signal:
                left = ["what was unfinished is removed", *getattr(signal, "__notes__", ())][-1]
                typer.echo(f"moequant: ended by {signal}; {left}", err=True)
                raise typer.Exit(signal.exit_code) from None


@contextmanager
def _usage(typed: list[str], command: str = "") -> Iterator[None]:
    """What was typed wrongly is one line, like every error, and exit code 2; with --json an object too. It is
    about `command` where the error itself does not say of which: the parser's own know none."""
    try:
        yield
    except UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            raise  # it prints the help
        name = command
        if error.ctx is not None:
            name = "" if error.ctx.parent is None else str(error.ctx.info_name)
        where = " ".join(["moequant", *([name] if name else []), "--help"])
        told = error.format_message().replace("Value error, ", "").replace(". Did you mean", "; did you mean")
        told = one_line(told).rstrip(".")
        asks = "" if told.endswith("?") else ";"
        message = f"{told[:1].lower()}{told[1:]}{asks} `{where}` shows what there is"
        typer.echo(f"moequant: {escape.plain(message)}", err=True)
        if "--json" in typed:
            emit(name, {"error": {"kind": "UsageError", "message": message}})
        raise typer.Exit(2) from None


def helped(ranks: Ranks) -> None:
    """What a process does that helps the first: its share, in silence. Exits with 1 when the run fails."""
    try:
        with interruptible(), silent():
            ranks.serve()
    except (MoequantError, OSError, *MEMORY_ERRORS, Interrupted) as error:
        if isinstance(error, MEMORY_ERRORS) and not lacks_memory(error):
            raise
        if ranks.end(error):
            typer.echo(f"moequant: {one_line(error)}; give the same command again to continue", err=True)
        raise SystemExit(1) from None


def place(model: str, cache: Path | None = None) -> Path | HubModel:
    """What was typed for a model: a path, or a name of the Hub that keeps its files in `cache`."""
    return guarded(lambda: located(model, cache))


def source(model: str, config: str | None, cache: Path | None = None) -> Path | HubModel | GgufModel:
    """The same for a model whose weights are read: maybe a GGUF file, with what else it needs in `config`."""
    found = place(model, cache)
    if config is None:
        return found
    if not isinstance(found, Path) or found.is_dir():
        typer.echo(f"moequant: --config goes with a GGUF file, and {model} is none", err=True)
        raise typer.Exit(1)
    return GgufModel(found, place(config, cache))


def local(place: Path | HubModel | GgufModel | None) -> Path | None:
    """A path that a run reads; None for what lies on the Hub."""
    if isinstance(place, GgufModel):
        return place.path
    return place if isinstance(place, Path) else None


def ram_bytes(size: str | None) -> int | None:
    """Bytes of `--ram`; PlanError for what is no size."""
    return None if size is None else memory_bytes(size)


def memory_bytes(text: str) -> int:
    """Bytes of some memory; PlanError for what is no size, and for a unit that somebody forgot."""
    from moequant.plan import parse_size

    found = parse_size(text)
    if text.strip().isdecimal() and found < 1 << 20:
        raise PlanError(f"size {text!r}: is {text.strip()} bytes; write {text.strip()}GiB for gigabytes")
    return found
