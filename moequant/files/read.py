"""Input: regular files of a bounded size, read whole."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from moequant.errors import CheckpointError, UnreadableError

LARGEST = 100_000_000
"""Bytes of a text that is read whole, unless the caller says otherwise."""


def read_text(path: Path, limit: int = LARGEST) -> str:
    """The UTF-8 of a regular file; CheckpointError when there is none, or more than `limit` bytes."""
    check_regular(path)
    if path.stat().st_size > limit:
        raise CheckpointError(f"{path}: {path.stat().st_size:,} bytes; at most {limit:,} were expected")
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise unreadable(path, error) from None


def read_json(path: Path, limit: int = LARGEST) -> dict[str, Any]:
    """A JSON object from a regular file; CheckpointError when there is none."""
    try:
        value = json.loads(read_text(path, limit))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: a JSON object was expected; download it again")
    return value


def check_regular(path: Path) -> None:
    """CheckpointError for a file that is not there, or is a folder, a device or a pipe."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise unreadable(path, error) from None
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path}: is not a regular file")


def unreadable(path: object, error: OSError) -> UnreadableError:
    """The error of a file that the system does not let us read."""
    return UnreadableError(f"{path}: cannot be read ({error.strerror or error})")
