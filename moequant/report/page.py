"""Pages: one file each, no network, light and dark, narrow and wide, and on paper.

Every page has the same style and script, which lie in templates/. A browser runs that script and no other:
its hash is in the page's policy, which also forbids every address.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from moequant import __version__
from moequant.escape import plain, size
from moequant.files import atomic
from moequant.report.maps import Map


def render(template: str, **values: Any) -> str:
    """The HTML of a page from templates/; whatever `values` hold is escaped."""
    environment, script = _environment(), _text("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(template).render(
        version=__version__,
        style=Markup(_text("page.css").rstrip()),
        script=Markup(script),
        script_hash=f"sha256-{digest}",
        **values,
    )


def write(text: str, path: Path) -> None:
    """The page into a file, whole or not at all. OutputError when the disk refuses."""
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")


def picture(svg: str) -> Markup:
    """A picture of ours, as it is."""
    return Markup(svg)


def present(*maps: Map | None) -> Sequence[Map]:
    """Those that there are."""
    return [each for each in maps if each is not None]


@cache
def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("moequant.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=printed,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"size": size, "percent": _percent, "fixed": _fixed}
    return made


@cache
def _text(name: str) -> str:
    """A file of templates/ as it is."""
    loader = _environment().loader
    assert loader is not None
    return loader.get_source(_environment(), name)[0]


def printed(value: object) -> object:
    """What a template prints: nothing that hides or turns the reading direction. Escaping comes after."""
    return plain(value, "\n") if isinstance(value, str) and not isinstance(value, Markup) else value


def _percent(value: float, digits: int = 2) -> str:
    return f"{value:.{digits}%}"


def _fixed(value: float, digits: int = 5) -> str:
    return f"{value:.{digits}f}"
