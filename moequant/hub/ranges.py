"""A file of the Hub that is read where it lies, by range requests."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from moequant.checkpoint.headers import MAX_HEADER
from moequant.errors import HubError
from moequant.hub.client import Snapshot, read_range

if TYPE_CHECKING:
    from moequant.hub.stream import Shelf

FIRST = 1 << 16
"""Bytes of a file that are asked for first: all of most headers."""

MOST = 1 << 26
"""Bytes of one request."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a snapshot; see `values.File`. Its first bytes, `head`, were fetched with it; the others come
    from `shelf`, or by range requests where there is none."""

    found: Snapshot
    name: str
    head: bytes = field(repr=False)
    shelf: Shelf | None = None

    def __str__(self) -> str:
        return f"{self.found.model}: {self.name}"

    @property
    def bytes(self) -> int:
        """See `File`."""
        return self.found.sizes[self.name]

    @property
    def stamp(self) -> str:
        """See `File`."""
        return self.found.commit

    def open(self) -> BinaryIO:
        """See `File`."""
        return cast(BinaryIO, _Ranges(self))


def with_header(found: Snapshot, name: str) -> RemoteFile:
    """A safetensors file, its header fetched. HubError for a header that is longer than the file."""
    size = found.sizes[name]
    head = read_range(found, name, 0, min(FIRST, size)) if size else b""
    length = 8 + int.from_bytes(head[:8], "little")
    if length > min(size, 8 + MAX_HEADER):
        raise HubError(f"{found.model}: {name}: no safetensors file; its header is longer than it is")
    if length > len(head):
        head += read_range(found, name, len(head), length)
    return RemoteFile(found, name, head)


class _Ranges(io.RawIOBase):
    """An open remote file: a position, and bytes from the head or from the network."""

    def __init__(self, file: RemoteFile) -> None:
        self._file, self._at = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.bytes}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        head, end = self._file.head, min(self._at + min(len(buffer), MOST), self._file.bytes)
        if self._at >= end:
            return 0
        data = head[self._at : end]
        buffer[: len(data)] = data
        begin = self._at + len(data)
        if begin < end and self._file.shelf is not None:
            begin += self._file.shelf.read_into(
                self._file.name, begin, memoryview(buffer)[len(data) : end - self._at]
            )
        elif begin < end:
            more = read_range(self._file.found, self._file.name, begin, end)
            buffer[len(data) : len(data) + len(more)] = more
            begin = end
        count, self._at = begin - self._at, begin
        return count
