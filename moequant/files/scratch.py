"""A folder, under TMPDIR unless somebody names another place, for what a run does not keep in memory."""

from __future__ import annotations

import fcntl
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moequant.errors import OutputError
from moequant.files.temporary import remove

_PREFIX = ".moequant-scratch-"
_NAME = re.compile(re.escape(_PREFIX) + "[a-z0-9_]{8}")


@contextmanager
def scratch(place: Path | None = None) -> Iterator[Path]:
    """A new folder in `place`, None for TMPDIR; gone with the run, or with the next one when it is killed.

    OutputError when there is no place for it.
    """
    try:
        root = place or Path(tempfile.gettempdir())
        _sweep(root)
        folder, handle = _create(root)
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(f"no folder for temporary files ({reason}); set TMPDIR to one with space") from None
    try:
        yield folder
    finally:
        remove(folder)
        os.close(handle)


def is_scratch(path: Path) -> bool:
    """Whether the path leads through a folder of `scratch`: what lies there goes with the run."""
    return any(_NAME.fullmatch(part) for part in path.absolute().parts)


def sweep_scratch() -> None:
    """Remove what dead runs have left in TMPDIR: of a run that needs no such folder itself."""
    with suppress(OSError):
        _sweep(Path(tempfile.gettempdir()))


def _create(root: Path) -> tuple[Path, int]:
    """A folder and the handle that locks it."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=root))
        try:
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # another run took it for a dead one's before it was locked
        _lock(handle, fcntl.LOCK_EX)
        if folder.is_dir():
            return folder, handle
        os.close(handle)


def _sweep(root: Path) -> None:
    """Remove the folders of dead runs of this user: nobody holds their locks."""
    for folder in root.iterdir():
        if not _NAME.fullmatch(folder.name):
            continue
        try:
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue  # gone, not a folder, or not this user's
        try:
            if os.fstat(handle).st_uid == os.getuid() and _lock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB):
                remove(folder)
        finally:
            os.close(handle)


def _lock(handle: int, how: int) -> bool:
    """False when another run holds it, or the file system knows no locks on folders."""
    try:
        fcntl.flock(handle, how)
    except OSError:
        return False
    return True
