"""What the header of a GGUF file says: keys, tensors, and arrays by their position."""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Final

from gguf import GGUFValueType

from moequant.errors import CheckpointError
from moequant.files.read import unreadable

SCALARS: Final = {
    GGUFValueType.UINT8: struct.Struct("<B"),
    GGUFValueType.INT8: struct.Struct("<b"),
    GGUFValueType.UINT16: struct.Struct("<H"),
    GGUFValueType.INT16: struct.Struct("<h"),
    GGUFValueType.UINT32: struct.Struct("<I"),
    GGUFValueType.INT32: struct.Struct("<i"),
    GGUFValueType.UINT64: struct.Struct("<Q"),
    GGUFValueType.INT64: struct.Struct("<q"),
    GGUFValueType.FLOAT32: struct.Struct("<f"),
    GGUFValueType.FLOAT64: struct.Struct("<d"),
    GGUFValueType.BOOL: struct.Struct("<?"),
}
"""How numbers are stored, little endian."""

MOST_LAYERS = 512
"""Blocks of the deepest model that llama.cpp loads (LLAMA_MAX_LAYERS)."""

_SHOWN = 1000
"""Letters of a string that is shown; the longest in real files are paths."""

_COUNT = 2**32
"""Counts are u32 in llama.cpp; a larger number is no count."""

_BLOCK = re.compile(r"blk\.([0-9]{1,6})\.")
_EXPERT = re.compile(r"\.ffn_(up|down|gate|gate_up)_(ch|)exps\.")


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
class Array:
    """An array of a header by its position: `count` elements in `size` bytes from `offset` of `path`."""

    path: Path
    kind: GGUFValueType
    count: int
    offset: int
    size: int

    def values(self) -> list[Any]:
        """The elements, read now: strings or numbers. Raises as `raw` does."""
        raw = self.raw()
        found = self._strings(raw) if self.kind is GGUFValueType.STRING else self._numbers(raw)
        if len(found) != self.count:
            raise self._changed()
        return found

    def raw(self) -> bytes:
        """The bytes of all elements. CheckpointError when the file is no longer as its header was read."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                raw = file.read(self.size)
        except OSError as error:
            raise unreadable(self.path, error) from None
        if len(raw) != self.size:
            raise self._changed()
        return raw

    def _changed(self) -> CheckpointError:
        return CheckpointError(f"{self.path}: changed while it was read; start again when it is complete")

    def _numbers(self, raw: bytes) -> list[Any]:
        number = SCALARS[self.kind]
        return [value for (value,) in number.iter_unpack(raw[: len(raw) // number.size * number.size])]

    def _strings(self, raw: bytes) -> list[Any]:
        found, at, length = [], 0, SCALARS[GGUFValueType.UINT64]
        while at + 8 <= len(raw):
            end = at + 8 + length.unpack_from(raw, at)[0]
            found.append(raw[at + 8 : end].decode("utf-8", "replace"))
            at = end
        return found if at == len(raw) else []


@dataclass(frozen=True, slots=True)
class Header:
    """What a GGUF file (all shards of it) says before its data; strings and numbers as Python values.

    Arrays of strings and long arrays of numbers are not in `metadata`: `array` reads them when asked.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: tuple[TensorInfo, ...]
    file_bytes: int
    arrays: Mapping[str, Array] = field(default_factory=dict)

    @property
    def arch(self) -> str:
        """llama.cpp's name of the architecture."""
        return self.text("general.architecture") or ""

    @property
    def bits(self) -> float:
        """Bits of weight data per weight."""
        return 8 * sum(tensor.bytes for tensor in self.tensors) / sum(tensor.numel for tensor in self.tensors)

    @property
    def layers(self) -> int:
        """Blocks, 0 without the key. CheckpointError when `block_count` is not what the tensors are of."""
        count = self.count("block_count")
        if not count:
            return 0
        last = max((tensor.layer for tensor in self.tensors if tensor.layer is not None), default=-1)
        # Blocks that guess further tokens are counted, but may have been left out.
        if count > MOST_LAYERS or not count - self.count("nextn_predict_layers") <= last + 1 <= count:
            raise CheckpointError(
                f"{self.path}: {self.arch}.block_count is {count:,}, but its tensors are of {last + 1:,} "
                f"blocks (at most {MOST_LAYERS}); download or make it again"
            )
        return count

    def text(self, key: str) -> str | None:
        """The string `key` (its whole name) as it can be shown on one line; None when there is none."""
        found = self.metadata.get(key)
        return plain(found) if isinstance(found, str) else None

    def get(self, key: str, default: Any = None) -> Any:
        """The value of `{arch}.key`."""
        return self.metadata.get(f"{self.arch}.{key}", default)

    def count(self, key: str, default: int = 0) -> int:
        """`{arch}.key` as a count. CheckpointError for anything but a whole number under 2**32."""
        return self._whole(key, self.get(key, default))

    def largest(self, key: str) -> int:
        """`{arch}.key`, the largest where each layer has its own; 0 without. Raises as `count` does."""
        value = self.get(key, 0)
        values = value if isinstance(value, tuple) else (value,)
        return max((self._whole(key, one) for one in values), default=0)

    def at(self, key: str, layer: int, default: int = 0) -> int:
        """`{arch}.key` of a layer, also where one number is for all. Raises as `count` does."""
        value = self.get(key, default)
        if not isinstance(value, tuple):
            return self._whole(key, value)
        if layer >= len(value):
            raise CheckpointError(
                f"{self.path}: {self.arch}.{key} has {len(value)} elements and none for layer {layer}; "
                "make it again"
            )
        return self._whole(key, value[layer])

    def array(self, key: str) -> list[Any]:
        """The elements of the array `key` (its whole name), read now; empty when there is none."""
        return self.arrays[key].values() if key in self.arrays else []

    def _whole(self, key: str, value: Any) -> int:
        if not isinstance(value, int) or not 0 <= value < _COUNT:
            raise CheckpointError(
                f"{self.path}: {self.arch}.{key} is {value!r:.40}, expected a whole number under 2**32; "
                "make it again"
            )
        return int(value)


def plain(text: str) -> str:
    """A string of a file as it can be shown on one line of a terminal."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text[:_SHOWN])
