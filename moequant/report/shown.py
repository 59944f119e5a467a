"""Every result of a verb can be shown: as text, as JSON, as a page, and in a notebook."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from rich.console import Console, RenderableType

from moequant.document import document
from moequant.errors import OutputError
from moequant.files import atomic
from moequant.report.fragment import fragment
from moequant.report.page import render

T = TypeVar("T")


class Shown(ABC):
    """What a verb found, and how it is looked at and kept."""

    __slots__ = ()

    @property
    @abstractmethod
    def command(self) -> str:
        """The command that finds this."""

    @abstractmethod
    def renderable(self, details: bool = True) -> RenderableType:
        """The report for a rich console."""

    @abstractmethod
    def value(self) -> dict[str, Any]:
        """All of it, as values that JSON has."""

    def summary(self, width: int = 100, details: bool = True) -> str:
        """The report as plain text, at most `width` columns wide."""
        console = Console(file=io.StringIO(), width=width, color_system=None)
        console.print(self.renderable(details))
        file = console.file
        assert isinstance(file, io.StringIO)
        return file.getvalue().rstrip() + "\n"

    def to_json(self) -> str:
        """What the command prints with --json, see docs/json.md."""
        return document(self.command, self.value())

    def html(self) -> str:
        """A whole page, in one file that needs no network."""
        return render("result.html", title=f"moequant {self.command}", body=fragment(self.renderable()))

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write it: JSON to a .json file, a page to .html, text to .txt.

        Raises OutputError for another ending, for a file that is there unless `overwrite`, and when the disk
        refuses.
        """
        makers = {".json": self.to_json, ".html": self.html, ".txt": self.summary}
        target = Path(path)
        if (make := makers.get(target.suffix)) is None:
            raise OutputError(
                f"{target}: results are saved as {', '.join(makers)}; give one of these endings"
            )
        with atomic(target, overwrite=overwrite) as partial:
            partial.write_text(make(), encoding="utf-8", errors="backslashreplace")

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return fragment(self.renderable(details=False))


@dataclass(frozen=True, slots=True)
class View(Generic[T]):
    """How what a command finds is drawn, and which values it has."""

    command: str
    draw: Callable[[T], RenderableType]
    values: Callable[[T], dict[str, Any]]
    page: Callable[[T], str] | None = None


@dataclass(frozen=True, slots=True)
class Result(Shown, Generic[T]):
    """What a verb found, as `found`; it can be printed, saved and shown in a notebook."""

    found: T
    view: View[T]

    @property
    def command(self) -> str:
        """See `Shown`."""
        return self.view.command

    def renderable(self, details: bool = True) -> RenderableType:
        """See `Shown`; these reports are the same with and without details."""
        return self.view.draw(self.found)

    def value(self) -> dict[str, Any]:
        """See `Shown`."""
        return self.view.values(self.found)

    def html(self) -> str:
        """See `Shown`."""
        return super(Result, self).html() if self.view.page is None else self.view.page(self.found)
