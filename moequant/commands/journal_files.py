"""Which files a journal's folder has, so that no other is ever removed with it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from moequant.errors import OutputError
from moequant.files import JOURNAL, discard

_PART = r"\d+/(part-\d{4,}|piece-\d{4,}-(experts|inner)-\d+-\d+)"
_CROSSING = r"plan/(probes|plans)"
_FIGURE = rf"plan/errors-\d{{4,}}|{_CROSSING}/(kl-\d{{4,}}|reached)"
_TABLE = r"\d+/part-\d{4,}-\d+\.bytes"
_SEALED = rf"(plan|done-\d+|{_PART}|{_FIGURE}|route/layer-\d{{4,}})\.safetensors"
_STATES = rf"(route|{_CROSSING}|\d+/(exact|rounded))/hidden-\d{{4,}}\.f32"
_FILES = re.compile(rf"run\.json|route/run\.json|beside\.json|{_SEALED}|{_TABLE}|{_STATES}")
_FOLDERS = re.compile(rf"route|plan|{_CROSSING}|\d+|\d+/(exact|rounded)")
_TEMPORARY = re.compile(r"\.(.+)\.moequant-(lock|[0-9a-f]{8})")


def dismiss(folder: Path) -> None:
    """Remove a journal at once, so that no part of one is left. Files that no run has put there stay."""
    try:
        check(folder)
        discard(folder, folder.with_name(folder.name.removesuffix(JOURNAL)))
    except (OutputError, OSError):
        remove(folder)


def check(folder: Path) -> None:
    """OutputError when `folder` holds anything that no run names so. It may be absent."""
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        raise _foreign(folder)
    for path in _entries(folder, folder):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (_FOLDERS if path.is_dir() else _FILES).fullmatch(_meant(name)):
            raise _foreign(path)
        if not path.is_dir() and not path.is_file():
            raise _foreign(path)


def _meant(name: str) -> str:
    """The name that a temporary file will get. Other names are given back as they are."""
    where, slash, last = name.rpartition("/")
    found = _TEMPORARY.fullmatch(last)
    return f"{where}{slash}{found[1]}" if found else name


def remove(part: Path, folder: Path | None = None) -> None:
    """Remove a journal, or `part` of the journal `folder`. Files that no run has put there stay."""
    around = folder or part
    for path in _entries(part, around) if part.is_dir() and not part.is_symlink() else ():
        name = _meant(path.relative_to(around).as_posix())
        if path.is_dir() and not path.is_symlink():
            with suppress(OSError):
                path.rmdir()
        elif _FILES.fullmatch(name):
            path.unlink(missing_ok=True)
    with suppress(OSError):
        part.rmdir()


def _entries(part: Path, folder: Path) -> Iterable[Path]:
    """Everything in there, folders after what is in them."""
    for where, folders, files in os.walk(part, topdown=False):
        yield from (Path(where) / name for name in (*files, *folders))


def _foreign(path: Path) -> OutputError:
    return OutputError(f"{path}: is not of a journal and is kept; move it away, or give another --out")


def bytes_of(folder: Path) -> int:
    """What the files of a journal take on the disk; 0 where there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
