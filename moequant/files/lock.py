"""One run at a time for each target: a lock on a hidden file beside it.

The kernel lets go of the lock when its holder dies, so a file that a dead run left is no obstacle.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moequant.errors import OutputError

_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
"""What file systems say that know no locks: runs there are not kept apart."""


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold the lock of the target `path`; False where the file system knows none.

    OutputError when another run holds it. The lock file is gone afterwards, unless the system forbids it:
    then it is no obstacle either.
    """
    lock = path.with_name(f".{path.name}.moequant-lock")
    handle, held = _acquire(lock, path)
    try:
        yield held
    finally:
        try:
            # While the lock is held, so that nobody holds a lock on a file without a name.
            with suppress(OSError):  # or it would be told instead of what went wrong inside
                lock.unlink()
        finally:
            os.close(handle)


def _acquire(lock: Path, path: Path) -> tuple[int, bool]:
    while True:
        handle = os.open(lock, _FLAGS, 0o666)
        try:
            held = _lock(handle, path)
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode) or status.st_size:
                raise OutputError(f"{lock}: is in the place of a lock file; move it away")
            if not held or _named(lock, status):
                return handle, held
        except BaseException:
            os.close(handle)
            raise
        # The run before removed the file between our opening and our locking it.
        os.close(handle)


def _lock(handle: int, path: Path) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutputError(
            f"{path}: another run is writing it; wait until it has ended, or give another name"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


def _named(lock: Path, status: os.stat_result) -> bool:
    """Whether the file that was opened still has that name."""
    try:
        return os.path.samestat(lock.lstat(), status)
    except FileNotFoundError:
        return False
