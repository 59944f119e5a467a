"""safetensors files written front to back: the header from known sizes, then bytes as they are made.

The `safetensors` package writes a file from tensors that are all in memory; here no more than
one tensor is. It reads what is written here, and the tests hold it to that.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from moequant.errors import OutputError, VerifyError

INDEX = "model.safetensors.index.json"

Bytes = bytes | memoryview

DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I8": 1, "U8": 1, "I32": 4, "I64": 8}


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of an output file; `dtype` as safetensors names it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of the folder and the tensors in it, in order."""

    name: str
    entries: tuple[Entry, ...]

    def header(self) -> bytes:
        """The length, then the JSON header, padded so that data starts at a multiple of 8."""
        described: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for entry in self.entries:
            described[entry.name] = {
                "dtype": entry.dtype,
                "shape": list(entry.shape),
                "data_offsets": [offset, offset + entry.bytes],
            }
            offset += entry.bytes
        text = json.dumps(described, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return len(self.header()) + sum(entry.bytes for entry in self.entries)


def cut(entries: Sequence[Entry], limit: int) -> tuple[Shard, ...]:
    """Entries in order into files of at most `limit` bytes of data (one tensor may be larger)."""
    parts: list[list[Entry]] = []
    room = -1
    for entry in entries:
        if entry.bytes > room or not parts:
            parts.append([])
            room = limit
        parts[-1].append(entry)
        room -= entry.bytes
    if len(parts) == 1:
        return (Shard("model.safetensors", tuple(parts[0])),)
    return tuple(
        Shard(f"model-{number:05}-of-{len(parts):05}.safetensors", tuple(part))
        for number, part in enumerate(parts, 1)
    )


def index(shards: Sequence[Shard]) -> str:
    """The text of the index file that names every tensor's shard."""
    weight_map = {entry.name: shard.name for shard in shards for entry in shard.entries}
    total = sum(entry.bytes for shard in shards for entry in shard.entries)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"


class ShardWriter:
    """Writes shards into `folder`, one tensor after another in their order; a context manager.

    `checksums` has the CRC-32 of every finished tensor, by name. OutputError when the disk refuses.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard]) -> None:
        self.folder = folder
        self.checksums: dict[str, int] = {}
        self._todo = [(shard, entry) for shard in shards for entry in shard.entries]
        self._at = 0
        self._file: BinaryIO | None = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        if kind is None and self._at < len(self._todo):
            raise VerifyError(f"{self.folder}: tensor {self._todo[self._at][1].name} was never written")

    def put(self, name: str, parts: Iterable[Bytes]) -> None:
        """The bytes of the next tensor, which must be `name`, in one or more parts."""
        shard, entry = self._todo[self._at]
        if entry.name != name:
            raise VerifyError(f"{self.folder}: {name} came where {entry.name} was planned")
        try:
            if self._at == 0 or self._todo[self._at - 1][0] is not shard:
                self._close()
                self._file = (self.folder / shard.name).open("wb")
                self._file.write(shard.header())
            assert self._file is not None
            size = checksum = 0
            for part in parts:
                checksum = zlib.crc32(part, checksum)
                size += self._file.write(part)
        except OSError as error:
            raise OutputError(f"{self.folder / shard.name}: cannot be written ({error.strerror})") from error
        if size != entry.bytes:
            raise VerifyError(f"{self.folder}: {size} bytes came for {entry}")
        self.checksums[name] = checksum
        self._at += 1

    def _close(self) -> None:
        """Flush the open file to the disk."""
        if self._file is None:
            return
        file, self._file = self._file, None
        try:
            file.flush()
            os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(f"{file.name}: cannot be written ({error.strerror})") from error
        finally:
            file.close()
