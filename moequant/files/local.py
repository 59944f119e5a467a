"""A file of this machine as `values.File` has it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from moequant.files.read import check_regular


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A regular file of this machine; see `values.File`. What reads it raises CheckpointError."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        """See `File`."""
        return self.path.name

    @property
    def bytes(self) -> int:
        """See `File`."""
        check_regular(self.path)
        return self.path.stat().st_size

    @property
    def stamp(self) -> str:
        """See `File`: size and time."""
        return f"{self.bytes} {self.path.stat().st_mtime_ns}"

    def open(self) -> BinaryIO:
        """See `File`."""
        check_regular(self.path)
        return self.path.open("rb", buffering=0)
