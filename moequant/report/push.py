"""What `push` would do or did, as tables for a terminal and as JSON."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from moequant.escape import shown, size
from moequant.hub.publish import Push
from moequant.report.style import line, table


def push_tables(found: Push) -> RenderableType:
    """Where the files go and what they replace, before anything is done; then what was done."""
    who = "private" if found.private else "public: everybody can read it"
    is_made = found.parent is None
    state = f"a new repository, {who}" if is_made else f"a repository that is there, {who}"
    made = table("", "file", "size", "")
    for each in found.files:
        made.add_row(each.name, size(each.bytes), "replaces what is there" if each.replaces else "new")
    count = f"{len(found.files)} file{'' if len(found.files) == 1 else 's'}"
    parts: list[RenderableType] = [
        line(f"{shown(found.folder)} → {found.repository}", style="bold"),
        line(f"{state}; {count}, {size(found.bytes)}"),
        made,
        *([line(f"stays here: {', '.join(found.left_out)}")] if found.left_out else []),
        *(line(f"note: {note}") for note in found.notes),
    ]
    if found.commit is not None:
        parts.append(uploaded(found))
    return Group(*parts)


def uploaded(found: Push) -> Text:
    """Whether it was done."""
    if found.commit is None:
        return line("nothing was uploaded; --yes uploads without asking", style="bold")
    return line(f"uploaded: {found.url}", style="bold")


def push_value(found: Push) -> dict[str, Any]:
    """All of it for a machine."""
    return {
        "repository": found.repository.repository,
        "revision": found.repository.revision,
        "folder": shown(found.folder),
        "parent": found.parent,
        "private": found.private,
        "bytes": found.bytes,
        "files": [
            {"name": each.name, "bytes": each.bytes, "replaces": each.replaces} for each in found.files
        ],
        "left_out": list(found.left_out),
        "notes": list(found.notes),
        "commit": found.commit,
        "url": found.url,
    }
