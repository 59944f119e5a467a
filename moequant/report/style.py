"""The house style of reports: lines, tables and sizes that hold whatever names they are given."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from moequant.escape import plain, size


def line(text: str, style: str = "") -> Text:
    """A line as it is: no markup is read in it, and only line ends at its end turn the line."""
    body = text.rstrip("\n")
    return Text(plain(body) + text[len(body) :], style=style)


class _Table(Table):
    """A table whose cells are lines."""

    def add_row(self, *cells: RenderableType | None, **options: Any) -> None:
        """One row; strings are shown as they are."""
        super().add_row(*(line(cell) if isinstance(cell, str) else cell for cell in cells), **options)


def table(title: str, *columns: str) -> Table:
    """An empty table in the house style: the first column left, numbers right."""
    made = _Table(
        title=line(title, style="bold") if title else None,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for index, column in enumerate(columns):
        made.add_column(line(column), justify="right" if index else "left")
    return made


def parts_table(parts: Mapping[Path, int]) -> Table:
    """The files of one output, and their sizes."""
    made = table(f"in {len(parts)} files", "file", "bytes", "size")
    for path, count in parts.items():
        made.add_row(path.name, f"{count:,}", size(count))
    return made
