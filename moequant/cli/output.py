"""What a run says, and how much: JSON or tables, errors of one line, quiet or verbose."""

from __future__ import annotations

import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO, TypeVar, cast

import typer
from rich.console import Console

from moequant import escape
from moequant.cli.lines import SILENT, Lines
from moequant.document import document
from moequant.errors import LONGEST, MEMORY_ERRORS, MoequantError, lacks_memory, one_line
from moequant.progress import listening

_LOG = logging.getLogger(__name__)

PIPE_WIDTH = 120

if TYPE_CHECKING:
    from moequant.report.shown import Shown

T = TypeVar("T")

Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Print only the result and errors: no progress, notices or warnings."),
]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose", help="Also print what each stage takes, and where in the code an error was raised."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables (docs/json.md).")]


def console() -> Console:
    """As wide as the terminal; wide enough for every table when the output goes to a file or a pipe."""
    made = Console()
    return made if made.is_terminal else Console(width=PIPE_WIDTH)


def tell(result: Shown, as_json: bool, details: bool = True) -> None:
    """Print a result: as JSON, or as tables."""
    if as_json:
        typer.echo(result.to_json())
    else:
        console().print(result.renderable(details), crop=False)


def emit(command: str, value: dict[str, Any]) -> None:
    """Print it."""
    typer.echo(document(command, value))


class Failed(typer.Exit):
    """A command ends with code 1: what went wrong was said on stderr."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(1)
        self.kind, self.message = kind, message


def guarded(action: Callable[[], T]) -> T:
    """The action's result; one line on stderr and exit code 1 for an error raised on purpose, for one of the
    operating system that nobody expected there, and for a lack of memory."""
    try:
        return action()
    except MoequantError as error:
        raise _failed(type(error).__name__, str(error)) from None
    except OSError as error:  # a name that no file can have, a file that vanished, a disk that fails
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        raise _failed("OSError", _noted(what, error)) from None
    except MEMORY_ERRORS as error:
        if not lacks_memory(error):
            raise
        what = f"memory ran out ({one_line(error)}); end other programs, or use a machine with more"
        raise _failed("MemoryError", _noted(what, error)) from None


def _noted(what: str, error: BaseException) -> str:
    """The message with what was added to the error on its way."""
    return "; ".join((what, *getattr(error, "__notes__", ())))


def _failed(kind: str, message: str) -> Failed:
    _LOG.debug("where it was raised:", exc_info=True)
    text = one_line(escape.plain(message), LONGEST)
    typer.echo(f"moequant: {text}", err=True)
    return Failed(kind, text)


def command(run: Callable[..., None]) -> Callable[..., None]:
    """A command with what all of them have: --quiet, --verbose, and errors as JSON where --json was given."""

    @wraps(run)
    def wrapped(*, quiet: bool, verbose: bool, **given: Any) -> None:
        with _said(quiet, verbose):
            try:
                _ran(run, given)
            except Failed as failed:
                if given.get("as_json"):
                    emit(run.__name__, {"error": {"kind": failed.kind, "message": failed.message}})
                raise

    own = inspect.signature(run, eval_str=True)
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=kind)
        for name, kind in (("quiet", Quiet), ("verbose", Verbose))
    ]
    whole = own.replace(parameters=[*own.parameters.values(), *more])
    wrapped.__signature__ = whole  # type: ignore[attr-defined]  # what typer reads
    wrapped.__annotations__ = {name: each.annotation for name, each in whole.parameters.items()}
    return wrapped


def _ran(run: Callable[..., None], given: dict[str, Any]) -> None:
    """The command. What it raises on purpose is one line, wherever: settings look at what they hold."""
    try:
        run(**given)
    except MoequantError as error:
        raise _failed(type(error).__name__, str(error)) from None


@contextmanager
def _said(quiet: bool, verbose: bool) -> Iterator[None]:
    """How much a command says while the block runs."""
    ours, everybody = logging.getLogger("moequant"), logging.getLogger()
    before = ours.level, everybody.level
    bars = sys.stderr.isatty()
    lines = Lines(sys.stderr, steps=not bars, silent=0 if verbose else SILENT)
    told = None if quiet or (bars and not verbose) else lines
    with listening(told), redirect_stderr(cast(TextIO, _NoTerminal(sys.stderr))) if quiet else nullcontext():
        if quiet:
            everybody.setLevel(logging.ERROR)
        ours.setLevel(logging.DEBUG if verbose else logging.ERROR if quiet else logging.INFO)
        try:
            yield
        finally:
            ours.setLevel(before[0])
            everybody.setLevel(before[1])


@contextmanager
def silent() -> Iterator[None]:
    """Nothing is said while the block runs."""
    logging.disable()
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere, redirect_stderr(nowhere):
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


class _NoTerminal:
    """A stream on which bars see no terminal; all else passes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def isatty(self) -> bool:
        """No bar is drawn on what is no terminal."""
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Lines(logging.Formatter):
    """Log records as the program's own lines."""

    def format(self, record: logging.LogRecord) -> str:
        who = "moequant" if record.name.split(".")[0] == "moequant" else record.levelname
        return f"{who}: {super().format(record)}"


def start_logging() -> None:
    """Notices of ours and warnings of everybody, on stderr, until an option says otherwise."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Lines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
