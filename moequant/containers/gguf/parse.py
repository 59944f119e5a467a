"""The header of one GGUF file, byte by byte: nothing that it says is believed before it is checked.

The layout and its rules are those of gguf.md and gguf.cpp in ggml. gguf-py's reader makes an array view of
every token, which takes seconds on today's vocabularies, and believes every count; here arrays are stepped
over and remembered by position, and four limits keep a hostile header from costing time or memory.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from moequant.containers.gguf.header import SCALARS, Array, TensorInfo
from moequant.errors import CheckpointError, UnreadableError
from moequant.files.read import unreadable
from moequant.values import File

KEPT: Final = 4096
"""Arrays of up to so many numbers are kept as tuples: no per-layer array is longer."""

_HEADER: Final = 2**28
"""Bytes of a header; the longest vocabularies take 40 MB."""

_ENTRIES: Final = 2**16
"""Keys, and tensors; the largest models have a few thousand."""

_STRINGS: Final = 2**22
"""Strings in all arrays together; tokens and merges of the largest vocabularies are under 2**20."""

_DECODED: Final = 2**26
"""Bytes of everything that becomes a Python value; a whole tokenizer.json in a key takes half of them."""

_NUMBER_COST: Final = 32
"""Bytes that a number of a kept array counts for: what Python needs to hold it."""

_NAME: Final = 2**16 - 1
"""Bytes of a name (gguf.md)."""

_WINDOW: Final = 2**20
"""Bytes read at once."""

_COMPLETE = "is the download complete?"
_AGAIN = "download or make it again"

_U32, _U64 = SCALARS[GGUFValueType.UINT32], SCALARS[GGUFValueType.UINT64]

_KINDS: Final = frozenset(int(kind) for kind in GGMLQuantizationType)


@dataclass(frozen=True, slots=True)
class Part:
    """What one file says before its data.

    `metadata` has strings, numbers, and short arrays of numbers as tuples; `arrays` every array by its
    position; `offsets` where in the file each tensor's data begins.
    """

    path: Path
    metadata: Mapping[str, Any]
    arrays: Mapping[str, Array]
    tensors: tuple[TensorInfo, ...]
    offsets: Mapping[str, int]
    bytes: int


def parse(path: Path, away: File | None = None) -> Part:
    """Read and check the header of one file; of its data only the size is looked at.

    A file that is not on this disk is read as `away`, and called `path`. Raises CheckpointError, one line,
    for what cannot be read or breaks a rule of the format.
    """
    if away is not None:
        with away.open() as file:
            return _Cursor(path, file, away.bytes).part()
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(f"{path}: not a regular file; give a GGUF file on a disk")
        with path.open("rb") as file:
            return _Cursor(path, file, found.st_size).part()
    except FileNotFoundError:
        raise UnreadableError(f"{path}: no such file; {_COMPLETE}") from None
    except OSError as error:
        raise unreadable(path, error) from None


class _Raw(NamedTuple):
    """A tensor as its header has it; the shape in torch order, `offset` from the beginning of the data."""

    kind: int
    shape: tuple[int, ...]
    offset: int


class _Cursor:
    """A position in a header that moves forward as values are read; `doing` is what errors call the place."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.file, self.size = path, file, size
        self.end = min(size, _HEADER)
        self.at, self.start, self.window = 0, 0, b""
        self.strings, self.decoded = _STRINGS, _DECODED
        self.doing = "the magic"

    def part(self) -> Part:
        """All of the header."""
        if self.size < 4 or self.take(4) != b"GGUF":
            raise CheckpointError(
                f"{self.path}: not a GGUF file (it starts with other bytes); give one, or a model folder"
            )
        self.version()
        n_tensors, n_keys = self.entries("tensors"), self.entries("keys")
        metadata: dict[str, Any] = {}
        arrays: dict[str, Array] = {}
        for number in range(n_keys):
            self.key(number, metadata, arrays)
        raw: dict[str, _Raw] = {}
        for number in range(n_tensors):
            self.tensor(number, raw)
        alignment = int(metadata.get("general.alignment", 32))
        start = -(-self.at // alignment) * alignment
        sizes = self.sizes(raw, start, alignment)
        tensors = tuple(TensorInfo(name, _type(t.kind), t.shape, sizes[name]) for name, t in raw.items())
        offsets = {name: start + tensor.offset for name, tensor in raw.items()}
        return Part(self.path, metadata, arrays, tensors, offsets, self.size)

    def wrong(self, what: str, then: str = _AGAIN) -> CheckpointError:
        """The error that says so."""
        return CheckpointError(f"{self.path}: damaged GGUF file: {what}; {then}")

    def see(self, size: int) -> int:
        """Where in `window` the next `size` bytes are."""
        if size > self.end - self.at:
            if self.end < self.size:
                raise self.wrong(
                    f"{self.doing} does not end in {_HEADER:,} bytes, as long as a header may be"
                )
            raise self.wrong(f"it ends inside {self.doing}", _COMPLETE)
        if self.at + size > self.start + len(self.window):
            self.file.seek(self.at)
            self.window, self.start = self.file.read(max(size, _WINDOW)), self.at
            if len(self.window) < size:
                raise self.wrong("it became shorter while it was read", _COMPLETE)
        return self.at - self.start

    def skip(self, size: int) -> None:
        """Move on without reading, over no more than there is."""
        if size > self.end - self.at:
            self.see(size)
        self.at += size

    def take(self, size: int) -> bytes:
        """The next bytes."""
        begin = self.see(size)
        self.at += size
        return self.window[begin : begin + size]

    def number(self, kind: struct.Struct) -> Any:
        """One number."""
        (value,) = kind.unpack(self.take(kind.size))
        return value

    def spend(self, size: int) -> None:
        """Count `size` bytes of Python values."""
        self.decoded -= size
        if self.decoded < 0:
            raise self.wrong(f"names and values up to {self.doing} take over {_DECODED:,} bytes")

    def string(self) -> bytes:
        """A string: u64 length, bytes."""
        length = self.number(_U64)
        if length <= self.end - self.at:  # else `take` says so
            self.spend(length)
        return self.take(length)

    def name(self) -> str:
        """A name that can be shown: 1 to 65,535 bytes of printable UTF-8."""
        raw = self.string()
        name = raw.decode("utf-8", "replace")
        if not name.isprintable() or "\ufffd" in name or not 0 < len(raw) <= _NAME:
            raise self.wrong(f"the name of {self.doing} is not 1 to {_NAME:,} bytes of printable UTF-8")
        return name

    def version(self) -> None:
        """Check it."""
        self.doing = "the version"
        found = self.number(_U32)
        if found not in (2, 3):
            swapped = ", big endian" if found & 0xFFFF == 0 and found else ""
            raise CheckpointError(
                f"{self.path}: GGUF version {found}{swapped}; expected 2 or 3, little endian; "
                "make it again with a current llama.cpp"
            )

    def entries(self, what: str) -> int:
        """A count of keys or tensors."""
        self.doing = f"the number of {what}"
        count = int(self.number(_U64))
        if count > _ENTRIES:
            raise self.wrong(f"{count:,} {what}, expected up to {_ENTRIES:,}")
        return count

    def key(self, number: int, metadata: dict[str, Any], arrays: dict[str, Array]) -> None:
        """One key and its value, put where `Part` has them."""
        self.doing = f"key {number + 1}"
        key = self.name()
        self.doing = f"key {key}"
        if key in metadata or key in arrays:
            raise self.wrong(f"{self.doing} is there twice")
        kind = self.kind()
        if kind is GGUFValueType.ARRAY:
            arrays[key] = array = self.array()
            if array.kind is not GGUFValueType.STRING and array.count <= KEPT:
                metadata[key] = self.short(array)
            return
        metadata[key] = value = self.scalar(kind)
        if key == "general.alignment" and (
            kind is not GGUFValueType.UINT32 or value < 8 or value & (value - 1)
        ):
            raise self.wrong(f"{self.doing} is {value!r:.40}, expected a u32 power of two of at least 8")

    def kind(self) -> GGUFValueType:
        """The type of a value."""
        found = self.number(_U32)
        try:
            return GGUFValueType(found)
        except ValueError:
            raise self.wrong(f"{self.doing} has a value of type {found}, expected 0 to 12") from None

    def scalar(self, kind: GGUFValueType) -> Any:
        """A string, a number or a bool."""
        if kind is GGUFValueType.STRING:
            return self.string().decode("utf-8", "replace")
        if kind is GGUFValueType.BOOL:
            return bool(self.bools(self.take(1))[0])
        return self.number(SCALARS[kind])

    def bools(self, raw: bytes) -> bytes:
        """The same bytes, each 0 or 1 (gguf.md)."""
        if raw.strip(b"\0\1"):
            raise self.wrong(f"{self.doing} has a bool that is neither 0 nor 1")
        return raw

    def array(self) -> Array:
        """An array by its position; short ones of numbers are left to `short`, all others stepped over."""
        kind, count = self.kind(), int(self.number(_U64))
        if kind is GGUFValueType.ARRAY:
            raise self.wrong(f"{self.doing} is an array of arrays, expected strings or numbers")
        begin = self.at
        if kind is GGUFValueType.STRING:
            self.step_over(count)
            return Array(self.path, kind, count, begin, self.at - begin)
        size = count * SCALARS[kind].size
        if count > KEPT:
            self.skip(size)
        return Array(self.path, kind, count, begin, size)

    def short(self, array: Array) -> tuple[Any, ...]:
        """The numbers of a short array."""
        self.spend(_NUMBER_COST * array.count)
        raw = self.take(array.size)
        if array.kind is GGUFValueType.BOOL:
            self.bools(raw)
        return tuple(value for (value,) in SCALARS[array.kind].iter_unpack(raw))

    def step_over(self, count: int) -> None:
        """Move over strings by their lengths: a vocabulary has hundreds of thousands."""
        self.strings -= count
        if self.strings < 0:
            raise self.wrong(f"{self.doing} has {count:,} strings, expected up to {_STRINGS:,} in all arrays")
        while count:
            at = begin = self.see(8)
            last = len(self.window) - 8
            while count and at <= last:
                at += 8 + _U64.unpack_from(self.window, at)[0]
                count -= 1
            self.skip(at - begin)

    def tensor(self, number: int, raw: dict[str, _Raw]) -> None:
        """One tensor's description, put into `raw`: every rule that needs no other tensor's place."""
        self.doing = f"tensor {number + 1}"
        name = self.name()
        self.doing = f"tensor {name}"
        if name in raw:
            raise self.wrong(f"{self.doing} is there twice")
        dims = self.number(_U32)
        if not 1 <= dims <= 4:
            raise self.wrong(f"{self.doing} has {dims:,} dimensions, expected 1 to 4")
        shape = tuple(self.number(_U64) for _ in range(dims))[::-1]
        if not 0 < prod(shape) < 2**63:
            raise self.wrong(f"{self.doing} has shape {list(shape)}, expected 1 to 2**63 - 1 numbers")
        raw[name] = _Raw(self.number(_U32), shape, self.number(_U64))

    def sizes(self, raw: dict[str, _Raw], start: int, alignment: int) -> dict[str, int]:
        """Bytes of every tensor by name, none over another or the end of the file.

        A type that gguf-py does not know takes the room up to the next tensor.
        """
        order = sorted(raw.items(), key=lambda item: item[1].offset)
        room = self.size - start
        ends = [*(tensor.offset for _, tensor in order[1:]), room]
        sizes = {}
        for (name, tensor), end in zip(order, ends, strict=False):
            if tensor.offset % alignment:
                raise self.wrong(f"tensor {name} is at {tensor.offset}, expected a multiple of {alignment}")
            size = self.known_bytes(name, tensor) or end - tensor.offset
            if tensor.offset + max(size, 1) > room:
                raise self.wrong(f"it ends inside tensor {name}", _COMPLETE)
            if tensor.offset + max(size, 1) > end:
                raise self.wrong(f"tensor {name} overlaps the one behind it")
            sizes[name] = size
        return sizes

    def known_bytes(self, name: str, tensor: _Raw) -> int | None:
        """Bytes of a tensor's data, None for a type that gguf-py does not know."""
        if tensor.kind not in _KINDS:
            return None
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.kind)]
        if tensor.shape[-1] % block:
            raise self.wrong(
                f"tensor {name} has rows of {tensor.shape[-1]:,}, expected a multiple of {block}, "
                f"the block of {_type(tensor.kind)}"
            )
        return int(prod(tensor.shape) // block * block_bytes)


def _type(kind: int) -> str:
    return str(GGMLQuantizationType(kind).name) if kind in _KINDS else f"type {kind}"
