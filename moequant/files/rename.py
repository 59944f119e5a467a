"""Renames that never replace what they were not told to, and that swap two folders at once.

Linux has a call for both (renameat2). Where kernel or file system lacks it, a file is linked under
its new name, and a folder is swapped in two steps that `temporary.repair` can finish or undo.
"""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

_HERE = -100  # AT_FDCWD
_NOREPLACE = 1
_EXCHANGE = 2


def move(old: Path, new: Path) -> None:
    """Rename `old` to `new`. FileExistsError when something has that name, and it stays."""
    if renameat2(old, new, _NOREPLACE):
        return
    if not old.is_dir():
        try:
            os.link(old, new)
        except FileExistsError:
            raise
        except OSError:
            pass  # a file system without links, such as FAT
        else:
            old.unlink()
            return
    if os.path.lexists(new):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(new))
    old.rename(new)


def exchange(one: Path, two: Path) -> bool:
    """Each gets the other's name, at once; False where that cannot be done."""
    return renameat2(one, two, _EXCHANGE)


def renameat2(old: Path, new: Path, flag: int) -> bool:
    """The call of that name; False where kernel or file system does not know it."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    if call(_HERE, os.fsencode(old), _HERE, os.fsencode(new), ctypes.c_uint(flag)) == 0:
        return True
    error = ctypes.get_errno()
    if error in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(error, os.strerror(error), str(new))
