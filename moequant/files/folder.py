"""A folder that moequant wrote: how it is known again, and what in it is somebody else's."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Set
from pathlib import Path

from moequant.errors import OutputError

RECORD = "moequant.json"
"""How the folder was made, and under `files` the names of all files in it that moequant wrote."""

_NO_LINKS = (errno.EPERM, errno.EXDEV, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS)
"""What file systems say that cannot link this file."""


def recorded(folder: Path) -> frozenset[str] | None:
    """Names of the files that moequant wrote into `folder`; None when its record does not tell."""
    record = folder / RECORD
    try:
        if not record.is_file():
            return None
        value = json.loads(record.read_text(encoding="utf-8"))
        made_by, files = value["made_by"], value["files"]
        known = made_by.startswith("moequant ") and all(isinstance(name, str) for name in files)
        return frozenset(files) if known else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def check_kept(folder: Path, names: Set[str]) -> None:
    """OutputError when the folder has a file, not written by moequant, in the place of one of `names`.

    For names of files that a new folder will have: said before any work is done, rather than by `carry_over`.
    """
    ours = recorded(folder) or frozenset()
    folders = {parent.as_posix() for name in names for parent in Path(name).parents}
    for name, empty in _entries(folder) if folder.is_dir() else ():
        above = {part.as_posix() for part in (name, *name.parents)}
        if name.as_posix() not in ours and (above & names or (not empty and name.as_posix() in folders)):
            raise _in_place(folder / name)


def _in_place(path: Path) -> OutputError:
    return OutputError(
        f"{path}: was not written by moequant, and the new folder has a file of that name; move it away"
    )


def carry_over(old: Path, new: Path, ours: Set[str]) -> None:
    """Bring everything in the folder `old` that is not among `ours` into `new`, by links where possible.

    `old` stays as it is. OutputError when `new` has a file of that name.
    """
    for name, empty in _entries(old):
        if name.as_posix() in ours:
            continue
        target = new / name
        _make_parents(old, new, name if empty else name.parent)
        if empty:
            continue
        if os.path.lexists(target):
            raise _in_place(old / name)
        try:
            os.link(old / name, target, follow_symlinks=False)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            shutil.copy2(old / name, target, follow_symlinks=False)


def _entries(folder: Path) -> Iterator[tuple[Path, bool]]:
    """Relative names of everything that is no folder, with False, and of empty folders, with True."""
    for where, folders, files in os.walk(folder):
        here = Path(where).relative_to(folder)
        links = [name for name in folders if (folder / here / name).is_symlink()]
        yield from ((here / name, False) for name in [*files, *links])
        if not files and not folders and here != Path():
            yield here, True


def _make_parents(old: Path, new: Path, name: Path) -> None:
    """The folder `name` in `new`, as readable to others as it is in `old`."""
    for part in [*reversed(name.parents), name]:
        if not (new / part).is_dir():
            (new / part).mkdir()
            shutil.copymode(old / part, new / part)
