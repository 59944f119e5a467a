"""Write docs/cli.md from the commands themselves: what `--help` says, whatever the terminal.

python scripts/build_cli_reference.py          write it
python scripts/build_cli_reference.py --check  exit 1 when it is not current

The commands' signatures are read, not the text of `--help`: its layout changes with the width of the terminal
and with the versions of typer and rich.
"""

from __future__ import annotations

import inspect
import sys
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from moequant.cli import app

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"

HEAD = """# Commands

Made by `python scripts/build_cli_reference.py` from the commands' own help; a test fails when it is stale.
"""

KINDS = {Path: "PATH", int: "N", float: "X", str: "TEXT"}
"""What stands for a value of a type, where an option does not name it itself."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One argument or option: its names, what stands for its value, its help and its default."""

    names: tuple[str, ...]
    value: str | None
    help: str
    default: Any
    required: bool
    is_argument: bool

    @property
    def row(self) -> str:
        """A row of the table of its command."""
        spelled = (
            self.value if self.is_argument else " ".join(filter(None, [", ".join(self.names), self.value]))
        )
        text = " ".join(self.help.split()).replace("|", "\\|")
        plain = self.default.value if isinstance(self.default, Enum) else self.default
        if self.required and not self.is_argument:
            text += " Required."
        elif isinstance(plain, (str, int, float)) and not isinstance(plain, bool):
            text += f" Default: `{plain}`."
        shown = str(spelled).replace("|", "\\|")
        return f"| `{shown}` | {text} |"


def render() -> str:
    """The page: the commands in alphabetical order, whoever adds them."""
    commands = {
        info.name or info.callback.__name__: info.callback
        for info in app.registered_commands
        if info.callback
    }
    names = sorted(commands)
    parts = [HEAD, "\n".join(f"- [{name}](#moequant-{name}): {summary(commands[name])}" for name in names)]
    parts += [section(name, commands[name]) for name in names]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def summary(command: Callable[..., Any]) -> str:
    """The first line of a command's help."""
    return (inspect.getdoc(command) or "").split("\n")[0]


def section(name: str, command: Callable[..., Any]) -> str:
    """Usage, help, arguments and options of a command."""
    found = parameters(command)
    usage = " ".join(["moequant", name, *(str(p.value) for p in found if p.is_argument), "[OPTIONS]"])
    rows = "\n".join(parameter.row for parameter in found)
    text = "\n\n".join(" ".join(part.split()) for part in (inspect.getdoc(command) or "").split("\n\n"))
    return f"## moequant {name}\n\n{text}\n\n    {usage}\n\n| | |\n|---|---|\n{rows}"


def parameters(command: Callable[..., Any]) -> list[Parameter]:
    """The parameters of a command, arguments first."""
    hints = typing.get_type_hints(command, include_extras=True)
    found = [
        parameter(name, hints[name], entry.default)
        for name, entry in inspect.signature(command).parameters.items()
    ]
    return sorted(found, key=lambda item: not item.is_argument)


def parameter(name: str, hint: Any, default: Any) -> Parameter:
    """A parameter from its annotation `Annotated[type, typer.Option(…)]`."""
    kind, info = typing.get_args(hint)[:2]
    is_argument = type(info).__name__ == "ArgumentInfo"
    # Inside Annotated, typer takes the first name for the default.
    given = [text for text in (info.default, *(info.param_decls or ())) if str(text).startswith("-")]
    many, inner = typing.get_origin(kind) in (list, tuple), plain_type(kind)
    spelled = name.strip("_").replace("_", "-")
    # typer gives a switch that does not name itself a second name to turn it off.
    unnamed = f"--{spelled}/--no-{spelled}" if inner is bool else f"--{spelled}"
    names = tuple(given) or (unnamed,)
    required = default is inspect.Parameter.empty
    if is_argument:
        value: str | None = (info.metavar or name.strip("_")).upper() + (" …" if many else "")
    elif inner is bool:
        value = None
    elif isinstance(inner, type) and issubclass(inner, Enum):
        value = "|".join(str(choice.value) for choice in inner)
    else:
        value = info.metavar or KINDS.get(inner, "VALUE")
    return Parameter(names, value, info.help or "", default, required, is_argument)


def plain_type(kind: Any) -> Any:
    """The type of one value: without `| None`, without the list around it."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        (kind,) = (arg for arg in typing.get_args(kind) if arg is not type(None))
    if typing.get_origin(kind) in (list, tuple):
        kind = typing.get_args(kind)[0]
    return kind


def main() -> None:
    """Write the page, or compare it."""
    page = render()
    if "--check" in sys.argv[1:]:
        sys.exit(PAGE.read_text(encoding="utf-8") != page)
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
