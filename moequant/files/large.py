"""Room for many bytes: in memory, or in a file that nobody else sees."""

from __future__ import annotations

import os
import tempfile
from math import prod

import numpy as np

from moequant.errors import OutputError

LARGE = 1 << 28
"""Bytes above which they lie in a file."""


def room(shape: tuple[int, ...], what: str) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Bytes of that shape for `what`, in memory where they are few; else in a file in TMPDIR without a name,
    and is gone with the last who holds them. OutputError when there is no place for it."""
    size = prod(shape)
    if size <= LARGE:
        return np.empty(shape, np.uint8)
    try:
        with tempfile.TemporaryFile() as file:
            os.posix_fallocate(file.fileno(), 0, size)  # a full disk would end the process later
            return np.memmap(file, np.uint8, "r+", shape=shape)
    except OSError as error:
        raise OutputError(
            f"{what}: no room for {size:,} bytes under {tempfile.gettempdir()} ({error.strerror or error}); "
            "set TMPDIR to a place with space"
        ) from None
