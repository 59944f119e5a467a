"""Records as Markdown. What people write below the mark of a page stays when its case runs again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.record import Record

NOTES = "<!-- Notes: what stands below this line is written by hand and kept. -->"


def lines(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    """Tables of the rows; a new one starts where the columns change."""
    columns: list[str] | None = None
    for row in rows:
        if list(row) != columns:
            if columns is not None:
                yield ""
            columns = list(row)
            yield "| " + " | ".join(columns) + " |"
            yield "|" + "---|" * len(columns)
        yield "| " + " | ".join(map(shown, row.values())) + " |"


def shown(value: Any) -> str:
    """A cell: five digits of a float, thousands apart, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e5 else f"{value:.5g}"
    if isinstance(value, tuple):
        return " ".join(map(shown, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def render(record: Record) -> str:
    """The page of one record."""
    commit = f"commit {record.commit[:7]}" if record.commit else "an unknown commit"
    changed = " with changes that were not committed" if record.dirty else ""
    machine = ", ".join([record.machine["cpu"], f"{record.machine['cores']} cores"])
    libraries = ", ".join(f"{name} {version}" for name, version in record.libraries.items())
    text = [
        f"# {record.purpose}",
        "",
        f"    {record.command}",
        "",
        f"{record.date[:10]}, {commit}{changed}. {machine}; load average at the start {record.load}.",
        f"It took {record.seconds:,.0f} s, {record.cpu_seconds:,.0f} s of them CPU time of this process.",
        f"{libraries}.",
        "",
        *lines(record.rows),
    ]
    return "\n".join(text) + "\n"


def write(record: Record, folder: Path) -> Path:
    """Write `folder`/CASE.md; of a page without the mark, all of it is kept below."""
    path = folder / f"{record.case}.md"
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    notes = before.partition(NOTES)[2] if NOTES in before else before
    text = render(record) + f"\n{NOTES}\n"
    path.write_text(text + (f"\n{notes.strip()}\n" if notes.strip() else ""), encoding="utf-8")
    return path
