"""A report for a console as HTML: lines become paragraphs, tables become tables."""

from __future__ import annotations

from collections.abc import Iterator

from markupsafe import Markup, escape
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text


def fragment(report: RenderableType) -> Markup:
    """The report as HTML without a page around it, in the style of whatever it is put into."""
    return Markup("\n").join(_parts(report))


def _parts(report: RenderableType) -> Iterator[Markup]:
    if isinstance(report, Group):
        for each in report.renderables:
            yield from _parts(each)
    elif isinstance(report, Table):
        yield _table(report)
    else:
        text = report.plain if isinstance(report, Text) else str(report)
        if lines := text.strip("\n"):
            bold = isinstance(report, Text) and "bold" in str(report.style)
            body = Markup("<br>").join(escape(line) for line in lines.split("\n"))
            yield Markup("<p><b>{}</b></p>" if bold else "<p>{}</p>").format(body)


def _table(table: Table) -> Markup:
    """Title, head, rows and caption; scrolls from side to side where it is too wide."""
    columns = [list(column.cells) for column in table.columns]
    head = Markup("").join(_cell("th", column.header) for column in table.columns)
    rows = Markup("").join(
        Markup("<tr>{}</tr>\n").format(Markup("").join(_cell("td", cell) for cell in row))
        for row in zip(*columns, strict=True)
    )
    title, caption = (_line(each) for each in (table.title, table.caption))
    return Markup(
        '{}<div class="wide" style="overflow-x:auto"><table>\n<tr>{}</tr>\n{}</table></div>{}'
    ).format(
        Markup("<h3>{}</h3>").format(title) if title else "",
        head,
        rows,
        Markup("<p><small>{}</small></p>").format(caption) if caption else "",
    )


def _cell(tag: str, cell: RenderableType) -> Markup:
    return Markup(f"<{tag}>{{}}</{tag}>").format(_line(cell))


def _line(text: RenderableType | None) -> str:
    return text.plain if isinstance(text, Text) else "" if text is None else str(text)
