"""GGUF files as moequant reads them, anyone's: the checked header of all shards, and the weights behind it.

gguf-py decodes the bytes, so that what our encoders wrote is read by somebody else's code. Data is read and
not mapped: it can be let go, and a file that shrinks is an error and no SIGBUS.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from math import gcd, prod
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import numpy as np

from moequant.containers.gguf.header import Header, TensorInfo
from moequant.containers.gguf.parse import Part, parse
from moequant.errors import CheckpointError, VerifyError
from moequant.files.local import LocalFile
from moequant.files.read import unreadable
from moequant.values import File, TensorRef

if TYPE_CHECKING:
    from torch import Tensor

_SHARD = re.compile(r"(.*)-([0-9]{5})-of-([0-9]{5})\.gguf")

AT_ONCE = 1 << 24
"""Weights that gguf-py decodes at a time: it holds what it makes three times over."""

WIDE = 1 << 12
"""Weights of a row for gguf-py, at least where there are so many: it takes 16 rows at a time, and short ones
cost it more in calls than in numbers."""

WHOLE = "I32"
"""The type of whole numbers: nobody decodes them."""

MOST_SHARDS = 10_000
"""Files of a model, at most: names promise more without having them."""

Bytes = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]
Floats = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


class GgufFile:
    """A GGUF file, all shards of it: its header, and its weights a tensor or an expert at a time.

    Raises CheckpointError, one line, for what is not a complete and healthy GGUF file.
    """

    def __init__(self, path: Path, away: Mapping[str, File] | None = None) -> None:
        parts = [parse(part, (away or {}).get(part.name)) for part in shards(path)]
        _check_shards(path, parts)
        self.path = path
        self.tensors: dict[str, TensorInfo] = {}
        self._places: dict[str, tuple[Path, int]] = {}
        for part in parts:
            for tensor in part.tensors:
                if tensor.name in self.tensors:
                    raise CheckpointError(f"{part.path}: tensor {tensor.name} is in another shard too; "
                                          "download all of them again")  # fmt: skip
                self.tensors[tensor.name] = tensor
                self._places[tensor.name] = (part.path, part.offsets[tensor.name])
        first, size = parts[0], sum(part.bytes for part in parts)
        self.header = Header(path, first.metadata, tuple(self.tensors.values()), size, first.arrays)

    def info(self, name: str) -> TensorInfo:
        """A tensor's description. VerifyError when the file has none of that name."""
        if name not in self.tensors:
            raise VerifyError(f"{self.path}: tensor {name} is missing")
        return self.tensors[name]

    def ref(self, name: str) -> TensorRef:
        """Where a tensor's bytes are; its shape is in weights, its dtype is ggml's. Raises as `info` does."""
        info, (path, offset) = self.info(name), self._places[name]
        return TensorRef(name, info.shape, info.type, LocalFile(path), offset, offset + info.bytes)

    def data(self, name: str, expert: int | None = None) -> Bytes:
        """The packed bytes of a tensor, or of one expert of a stack [E, out, in]: u8 [rows, row_bytes].

        Raises VerifyError for a missing tensor and one of an unknown type, CheckpointError for a file that is
        no longer as its header was read.
        """
        info, (path, offset) = self._known(name), self._places[name]
        rows, size = prod(info.shape[:-1]), info.bytes
        if expert is not None:
            rows, size = rows // info.shape[0], size // info.shape[0]
            offset += expert * size
        return _read(path, name, offset, size).reshape(rows, -1)

    def bands(self, name: str, at_once: int = AT_ONCE) -> Iterator[tuple[range, Bytes]]:
        """The packed rows of a tensor, so many bytes at a time, with which they are. Raises what `data`
        raises."""
        info = self.info(name)
        count = prod(info.shape[:-1])
        step = max(1, at_once * count // max(1, info.bytes))
        for first in range(0, count, step):
            rows = range(first, min(first + step, count))
            yield rows, self._rows(name, rows)

    def rows(self, name: str, wanted: range | tuple[int, ...]) -> Tensor:
        """Rows of a matrix, in rising order, decoded by gguf-py, f32: no others are read."""
        import torch  # see `values`

        info, numbers = self.info(name), np.asarray(wanted, np.int64)
        runs = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1)
        packed = np.concatenate([self._rows(name, range(run[0], run[-1] + 1)) for run in runs])
        step, label = max(1, AT_ONCE // info.shape[-1]), f"{self.path}: {name}"
        parts = [decode(packed[at : at + step], info.type, label) for at in range(0, len(packed), step)]
        return torch.from_numpy(np.concatenate(parts))

    def _rows(self, name: str, rows: range) -> Bytes:
        """The packed bytes of rows that follow each other, u8 [n, row_bytes]; see `data`."""
        info, (path, offset) = self._known(name), self._places[name]
        size = info.bytes // prod(info.shape[:-1])
        return _read(path, name, offset + rows.start * size, len(rows) * size).reshape(len(rows), size)

    def _known(self, name: str) -> TensorInfo:
        """`info` of a tensor whose type gguf-py knows. VerifyError for another."""
        info = self.info(name)
        if info.type not in gguf.GGMLQuantizationType.__members__:
            raise VerifyError(f"{self.path}: {name} is of {info.type}, which gguf-py does not know")
        return info

    def values(self, name: str, experts: range | None = None) -> Tensor:
        """A tensor decoded by gguf-py, f32 in its own shape, or these experts of a stack [E, out, in]: one by
        one, some rows at a time; whole numbers as they are.

        Raises what `data` raises, and VerifyError for a type that gguf-py cannot decode.
        """
        import torch  # headers are read without it: a second faster

        info, label = self.info(name), f"{self.path}: {name}"
        if info.type == WHOLE:
            return torch.from_numpy(self.data(name)).view(torch.int32).view(info.shape)
        stacked = len(info.shape) == 3
        numbers = experts or range(info.shape[0] if stacked else 1)
        out = np.empty((len(numbers), *info.shape[1:]) if stacked else info.shape, np.float32)
        for expert, part in zip(numbers, out if stacked else out[None], strict=True):
            packed, rows = self.data(name, expert if stacked else None), part.reshape(-1, info.shape[-1])
            step = max(1, AT_ONCE // rows.shape[1])
            for at in range(0, len(rows), step):
                rows[at : at + step] = decode(packed[at : at + step], info.type, label)
        return torch.from_numpy(out)


def _read(path: Path, name: str, offset: int, size: int) -> Bytes:
    """Bytes of a tensor. CheckpointError for a file that is no longer as its header was read."""
    try:
        found = np.fromfile(path, np.uint8, size, offset=offset)
    except OSError as error:
        raise unreadable(path, error) from None
    if len(found) < size:
        raise CheckpointError(f"{path}: ends inside tensor {name}; is the download complete?")
    return found


def read_header(path: Path, away: Mapping[str, File] | None = None) -> Header:
    """Keys and tensor descriptions of a GGUF file, of all shards when it is the first of several.

    `away` has those files, by their names, that are not on this disk. Raises CheckpointError as `GgufFile`
    does.
    """
    return GgufFile(path, away).header


def decode(data: Bytes, type_name: str, name: str) -> Floats:
    """Packed rows of `name` [..., row_bytes] decoded by gguf-py, f32 [..., n]. VerifyError when it cannot."""
    kind = gguf.GGMLQuantizationType[type_name]
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    rows, row_bytes = data.reshape(-1, data.shape[-1]).shape
    n = row_bytes // block_bytes * block
    joined = gcd(rows, max(1, WIDE // max(1, n)))  # rows are whole blocks, one behind the other
    try:
        with np.errstate(all="ignore"):  # damaged scales may overflow; callers look at the values
            values = gguf.dequantize(data.reshape(rows // joined, joined * row_bytes), kind)
    except NotImplementedError:
        raise VerifyError(f"{name} is {type_name}, which gguf-py cannot decode") from None
    return np.ascontiguousarray(values, np.float32).reshape(*data.shape[:-1], n)


def shards(path: Path) -> list[Path]:
    """All files of a GGUF by the name of its first, whether they are there or not.

    CheckpointError when it is not the first.
    """
    found = _SHARD.fullmatch(path.name)
    if found is None:
        return [path]
    stem, number, count = found[1], int(found[2]), int(found[3])
    if number != 1:
        raise CheckpointError(
            f"{path}: shard {number} of {count}; give the first, {stem}-00001-of-{found[3]}.gguf"
        )
    if count > MOST_SHARDS:
        raise CheckpointError(f"{path}: one of {count:,} shards; at most {MOST_SHARDS:,} were expected")
    return [path.with_name(f"{stem}-{i:05d}-of-{found[3]}.gguf") for i in range(1, max(count, 1) + 1)]


def _check_shards(path: Path, parts: list[Part]) -> None:
    """CheckpointError when shards do not say of themselves what their names say."""
    if len(parts) == 1 and parts[0].metadata.get("split.count", 1) in (0, 1):
        return
    total = sum(len(part.tensors) for part in parts)
    wanted = [(part, "split.count", len(parts)) for part in parts]
    wanted += [(part, "split.no", number) for number, part in enumerate(parts)]
    wanted += [(part, "split.tensors.count", total) for part in parts]
    for part, key, value in wanted:
        if (found := part.metadata.get(key)) != value:
            raise CheckpointError(
                f"{part.path}: {key} is {found!r:.40}, expected {value} of a shard by that name; "
                "download all of them again, under the names that they were made with"
            )
