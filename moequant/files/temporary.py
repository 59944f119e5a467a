"""Temporary names beside a target, and what dead runs left under them.

All functions are for whoever holds the target's lock: any temporary that is there already was left
by a run that is dead.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from pathlib import Path

JOURNAL = ".journal"
"""What the names of folders end with in which a run keeps what it has finished."""


def create(path: Path, folder: bool) -> Path:
    """A new empty file or folder beside `path`, under a name that nobody can know before."""
    partial = path.with_name(f"{prefix(path)}{secrets.token_hex(4)}")
    if folder:
        partial.mkdir()
    else:
        os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
    return partial


def sweep(path: Path) -> None:
    """Remove the temporaries of dead runs, and finish or undo a swap in which one died."""
    repair(path)
    name = re.compile(re.escape(prefix(path)) + "[0-9a-f]{8}")
    for entry in path.parent.iterdir():
        if name.fullmatch(entry.name):
            remove(entry)


def discard(folder: Path, path: Path) -> None:
    """Remove `folder`, which lies beside the target `path`: it is gone at once, and its rest with the next
    run to that target if this one dies."""
    gone = folder.with_name(f"{prefix(path)}{secrets.token_hex(4)}")
    folder.rename(gone)
    sync(folder.parent)
    remove(gone)


def aside(path: Path) -> Path:
    """Where the old folder waits while a new one takes its place in two steps."""
    return path.with_name(f"{prefix(path)}old")


def repair(path: Path) -> None:
    """After a swap in two steps, wherever it ended: the old folder is back, or it is removed."""
    old = aside(path)
    if not os.path.lexists(old):
        return
    if os.path.lexists(path):
        remove(old)
    else:
        old.rename(path)


def remove(path: Path) -> None:
    """Remove a file or a whole folder; what a symlink leads to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file or folder to the disk: a name must not outlive a crash that its bytes did not."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Flush everything in a folder, then the folder."""
    for path in folder.rglob("*"):
        if not path.is_symlink():
            sync(path)
    sync(folder)


def prefix(path: Path) -> str:
    """How the names of everything beside the target `path` begin."""
    return f".{path.name}.moequant-"
