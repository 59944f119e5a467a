"""Text that came from files and command lines, made safe for where it is shown.

Names of files, tensors and domains, metadata and what models say may hold anything: codes that steer a
terminal, markup, formulas. Here they become what a person would read.
"""

from __future__ import annotations

import codecs
import re
import shlex
import unicodedata
from collections.abc import Sequence
from pathlib import Path

_HIDDEN = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
"""Unicode's categories of what is no visible character: controls, formats, surrogates, line ends."""

_CACHED = re.compile(r"/models--([^/]+--[^/]+|[^/]+)/snapshots/([0-9a-f]{40})(?:/(.+))?$")

_MARKDOWN = re.compile(r"([\\`*\[\]<>|~&]|^[#+-]|(?<!\w)_|_(?!\w))")

_YAML_WORD = re.compile(r"[A-Za-z][A-Za-z0-9_.+-]*(/[A-Za-z0-9_.+-]+)*")

_YAML_VALUES = {"true", "false", "yes", "no", "on", "off", "y", "n", "null"}
"""Words that YAML does not take for text."""

_ASCII = {
    "→": "->",
    "±": "+-",
    "×": "x",
    "Δ": "d",
    "…": "...",
    "–": "-",
    "−": "-",
    "⏎": "\\n",
    "’": "'",
}
"""What our own reports print, for terminals that have only ASCII."""


def plain(text: str, newline: str = "⏎") -> str:
    """For a terminal or a page: what would steer the terminal, turn the line or hide is spelled out."""
    return "".join(
        newline if one == "\n" else one if _visible(one) else f"\\u{{{ord(one):x}}}" for one in text
    )


def _visible(character: str) -> bool:
    return unicodedata.category(character) not in _HIDDEN


def size(count: int) -> str:
    """Bytes as people say them, in powers of ten like file managers and download pages."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1000
    return f"{value:.2f} TB"


def shown(path: Path) -> str:
    """What reports and pages call a file: not where it lies on this machine. In Hugging Face's cache it is
    what the Hub calls it."""
    cached = of_cache(path)
    if cached is None:
        return path.name or path.resolve().name
    repository, _, file = cached
    return f"{repository}:{file}" if file else repository


def of_cache(path: Path) -> tuple[str, str, str] | None:
    """Model, commit and file of a path in Hugging Face's cache; None for any other.

    A file of the cache is a link to another place: its own name tells first.
    """
    found = _CACHED.search(path.absolute().as_posix()) or _CACHED.search(path.resolve().as_posix())
    return (found[1].replace("--", "/", 1), found[2], found[3] or "") if found else None


def described(path: Path) -> dict[str, str | None]:
    """A model for a machine: its name, and its commit where it lies in Hugging Face's cache."""
    cached = of_cache(path)
    return {"path": shown(path), "revision": cached[1] if cached else None}


def mathtext(text: str) -> str:
    """For matplotlib, which takes what stands between two dollars for a formula."""
    return plain(text).replace("$", r"\$")


def markdown(text: str) -> str:
    """For a line or a table cell of Markdown."""
    return _MARKDOWN.sub(r"\\\1", plain(text))


def yaml(text: str) -> str:
    """A YAML scalar: bare where it is a plain word, else in quotes, on one line, in ASCII."""
    if _YAML_WORD.fullmatch(text) and text.lower() not in _YAML_VALUES:
        return text
    return '"' + "".join(one if _bare(one) else f"\\U{ord(one):08x}" for one in plain(text)) + '"'


def _bare(character: str) -> bool:
    return " " <= character <= "~" and character not in '"\\'


def text_names(source: str) -> str:
    """Sources of text, such as `calib/a.txt, org/name`, for others to read: files by their names alone."""
    return ", ".join(Path(each).name if _is_local(each) else each for each in source.split(", "))


def _is_local(source: str) -> bool:
    """Whether a source of text is a place on this machine, and not the name of a data set."""
    return "/" in source and (source.startswith(("/", "~", ".")) or _is_path(source))


def command(arguments: Sequence[str]) -> str:
    """A command line for others to read: paths that are there are shown as names."""
    return shlex.join([_named(argument) for argument in arguments])


def _named(argument: str) -> str:
    option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return f"{option}{equals}{Path(value).name}" if "/" in value and _is_path(value) else argument


def _is_path(value: str) -> bool:
    """Whether it names a file, or a name in a folder that is there, such as an output."""
    try:
        return Path(value).exists() or Path(value).parent.is_dir()
    except (OSError, ValueError):
        return False


def _stand_in(error: UnicodeError) -> tuple[str, int]:
    """A codec's error handler: what an encoding lacks is printed as ASCII."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lost = error.object[error.start : error.end]
    return "".join(_ASCII.get(one) or f"\\u{{{ord(one):x}}}" for one in lost), error.end


STAND_IN = "moequant.ascii"
"""The error handler's name, for `reconfigure(errors=STAND_IN)`."""

codecs.register_error(STAND_IN, _stand_in)
