"""Output files: refused before any work is done, and never half-written under their own name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moequant.errors import OutputError


def check_output(path: Path, overwrite: bool) -> None:
    """OutputError when no file can be put at `path`."""
    if path.is_dir():
        raise OutputError(f"{path}: is a folder; give a file name")
    if path.exists() and not overwrite:
        raise OutputError(f"{path}: exists already; give another name or --overwrite")
    if not path.parent.is_dir():
        raise OutputError(f"{path.parent}: no such folder; create it first")
    if not os.access(path.parent, os.W_OK):
        raise OutputError(f"{path.parent}: not writable")


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; takes its place when the block ends well, else is removed.

    Raises OutputError when the disk refuses.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        _sync(partial)
        partial.replace(path)
        _sync(path.parent)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        partial.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Flush a file or folder to the disk: a name must not outlive a crash that its bytes did not."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
