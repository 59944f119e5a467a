"""The header of a GGUF file, without its data: keys and tensor descriptions, whatever the size behind them.

A reader of its own because gguf-py makes an array view of every token of the vocabulary, which takes
seconds on today's vocabularies; here long arrays are stepped over. The layout is that of gguf.md in ggml.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from moequant.errors import CheckpointError

_SCALARS: Final = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.FLOAT64: "<d",
    GGUFValueType.BOOL: "<?",
}
_KEPT: Final = 4096
"""Arrays of more numbers than this are counted, not kept: no per-layer array is longer."""

_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_BLOCK = re.compile(r"blk\.(\d+)\.")
_EXPERT = re.compile(r"\.ffn_(up|down|gate|gate_up)_(ch|)exps\.")


@dataclass(frozen=True, slots=True)
class Skipped:
    """An array that was stepped over: so many elements."""

    count: int


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: ggml type by name, shape in torch order, bytes of its data."""

    name: str
    type: str
    shape: tuple[int, ...]
    bytes: int

    @property
    def numel(self) -> int:
        """How many numbers it holds."""
        return prod(self.shape)

    @property
    def layer(self) -> int | None:
        """The block it belongs to, None outside of them."""
        found = _BLOCK.match(self.name)
        return int(found[1]) if found else None

    @property
    def is_expert(self) -> bool:
        """Whether llama.cpp's `--n-cpu-moe` moves it: the same names as its regular expression, data only."""
        return len(self.shape) == 3 and _EXPERT.search(self.name) is not None


@dataclass(frozen=True, slots=True)
class Header:
    """What a GGUF file (all shards of it) says before its data; strings and numbers as Python values."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: tuple[TensorInfo, ...]
    file_bytes: int

    @property
    def arch(self) -> str:
        """llama.cpp's name of the architecture."""
        return str(self.metadata.get("general.architecture", ""))

    @property
    def bits(self) -> float:
        """Bits of weight data per weight."""
        return 8 * sum(tensor.bytes for tensor in self.tensors) / sum(tensor.numel for tensor in self.tensors)

    def get(self, key: str, default: Any = None) -> Any:
        """The value of `{arch}.key`."""
        return self.metadata.get(f"{self.arch}.{key}", default)


def read_header(path: Path) -> Header:
    """Read keys and tensor descriptions of a GGUF file, of all shards when it is the first of several.

    Raises CheckpointError for what is not a complete GGUF file and for missing shards.
    """
    paths = _shards(path)
    parts = [_read_one(part) for part in paths]
    tensors = tuple(tensor for _, found in parts for tensor in found)
    return Header(path, parts[0][0], tensors, sum(part.stat().st_size for part in paths))


def _shards(path: Path) -> list[Path]:
    found = _SHARD.fullmatch(path.name)
    if found is None:
        paths = [path]
    else:
        stem, number, count = found[1], int(found[2]), int(found[3])
        if number != 1:
            raise CheckpointError(
                f"{path}: shard {number} of {count}; give the first, {stem}-00001-of-{found[3]}.gguf"
            )
        paths = [path.with_name(f"{stem}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]
    for part in paths:
        if not part.is_file():
            raise CheckpointError(f"{part}: no such file; is the download complete?")
    return paths


def _read_one(path: Path) -> tuple[dict[str, Any], list[TensorInfo]]:
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise CheckpointError(f"{path}: not a GGUF file (it starts with other bytes)")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _Cursor(data).contents(path)
            except (struct.error, IndexError, ValueError, OverflowError) as error:
                raise CheckpointError(
                    f"{path}: damaged GGUF header ({error}); is the download complete?"
                ) from error


class _Cursor:
    """A position in the header's bytes that moves as values are read."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 4

    def contents(self, path: Path) -> tuple[dict[str, Any], list[TensorInfo]]:
        """Keys and tensors, the length of the file checked against what they promise."""
        version = self.number("<I")
        if version not in (2, 3):
            raise CheckpointError(f"{path}: GGUF version {version}; expected 2 or 3, little endian")
        n_tensors, n_keys = self.number("<Q"), self.number("<Q")
        metadata = {self.string(): self.value(GGUFValueType(self.number("<I"))) for _ in range(n_keys)}
        raw = [self.tensor() for _ in range(n_tensors)]
        alignment = int(metadata.get("general.alignment", 32))
        start = -(-self.at // alignment) * alignment
        room = len(self.data) - start
        ends = dict(_neighbours(sorted(offset for _, _, _, offset in raw), room))
        tensors = []
        for name, kind, shape, offset in raw:
            type_name, size = _type(kind, shape, ends[offset] - offset)
            if offset + size > room:
                raise CheckpointError(f"{path}: ends inside tensor {name}; is the download complete?")
            tensors.append(TensorInfo(name, type_name, shape, size))
        return metadata, tensors

    def number(self, kind: str) -> Any:
        """One number in struct's notation."""
        (value,) = struct.unpack_from(kind, self.data, self.at)
        self.at += struct.calcsize(kind)
        return value

    def string(self) -> str:
        """A string: u64 length, UTF-8."""
        length = self.number("<Q")
        if length > len(self.data) - self.at:
            raise IndexError(f"a string of {length} bytes at {self.at}")
        raw = self.data[self.at : self.at + length]
        self.at += length
        return raw.decode("utf-8", "replace")

    def value(self, kind: GGUFValueType) -> Any:
        """A value; arrays of strings and long arrays become `Skipped`."""
        if kind is GGUFValueType.STRING:
            return self.string()
        if kind is not GGUFValueType.ARRAY:
            return self.number(_SCALARS[kind])
        inner, count = GGUFValueType(self.number("<I")), self.number("<Q")
        if inner is GGUFValueType.STRING:
            for _ in range(count):
                self.at += 8 + struct.unpack_from("<Q", self.data, self.at)[0]
            return Skipped(count)
        if inner is GGUFValueType.ARRAY or count > _KEPT:
            if inner is GGUFValueType.ARRAY:
                raise IndexError("arrays of arrays are not known")
            self.at += count * struct.calcsize(_SCALARS[inner])
            return Skipped(count)
        return tuple(self.number(_SCALARS[inner]) for _ in range(count))

    def tensor(self) -> tuple[str, int, tuple[int, ...], int]:
        """Name, type, shape (torch order) and offset of a tensor."""
        name = self.string()
        shape = tuple(self.number("<Q") for _ in range(self.number("<I")))
        return name, self.number("<I"), shape[::-1], self.number("<Q")


def _neighbours(offsets: list[int], end: int) -> list[tuple[int, int]]:
    """Every offset with the one that follows it."""
    return list(zip(offsets, [*offsets, end][1:], strict=True))


def _type(kind: int, shape: tuple[int, ...], room: int) -> tuple[str, int]:
    """Name and bytes; a type that gguf-py does not know takes the room up to the next tensor."""
    try:
        known = GGMLQuantizationType(kind)
    except ValueError:
        return f"type {kind}", room
    block, block_bytes = GGML_QUANT_SIZES[known]
    return known.name, prod(shape) // block * block_bytes
