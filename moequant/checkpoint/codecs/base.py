"""Stored values as they are, read a range of rows at a time; other codecs stand on this."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import torch
from torch import Tensor

from moequant.errors import CheckpointError
from moequant.files.read import unreadable
from moequant.values import Stored, TensorRef

DTYPES: Mapping[str, torch.dtype] = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}
"""torch's dtype for each that codecs read, by its name in safetensors."""


def read_part(ref: TensorRef, index: int | None = None, rows: range | None = None) -> Tensor:
    """Stored values of a part as they are: matrix `index` and `rows` as in `Stored.read`.

    Reads only the bytes asked for. CheckpointError when the file ends before them.
    """
    dtype = DTYPES[ref.dtype]
    shape = ref.shape if index is None else ref.shape[1:]
    begin = ref.begin + (index or 0) * prod(shape) * dtype.itemsize
    if rows is not None and shape:
        begin += rows.start * prod(shape[1:]) * dtype.itemsize
        shape = (len(rows), *shape[1:])
    out = torch.empty(shape, dtype=dtype)
    _read_into(ref, begin, out.view(-1).view(torch.uint8).numpy())
    return out


def damaged(tensor: str, found: str) -> CheckpointError:
    """The error for stored bytes that cannot be meant."""
    return CheckpointError(f"tensor {tensor}: {found}; the checkpoint is damaged, download it again")


def read_bytes(ref: TensorRef, begin: int, count: int) -> memoryview:
    """So many bytes of a tensor's file from `begin` on. CheckpointError when the file ends before them."""
    out = np.empty(count, np.uint8)
    _read_into(ref, begin, out)
    return out.data


def _read_into(ref: TensorRef, begin: int, out: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> None:
    view = out.data
    try:
        with ref.file.open() as file:
            file.seek(begin)
            while view:
                count = file.readinto(view)  # type: ignore[attr-defined]  # every binary file has it
                if not count:
                    raise CheckpointError(
                        f"{ref.file}: ends inside tensor {ref.name}; is the download complete?"
                    )
                view = view[count:]
    except OSError as error:  # here, for whoever writes would take it for an error of the output
        raise unreadable(ref.file, error) from None


@dataclass(frozen=True, slots=True)
class Plain:
    """bf16, f16 or f32, stored as they are."""

    name: str = "plain"

    def decode(self, stored: Stored, index: int | None, rows: range | None) -> Tensor:
        """See `Codec`."""
        return read_part(stored.parts[""], index, rows)


@dataclass(frozen=True, slots=True)
class WholeNumbers(Plain):
    """Whole numbers from 0 to `below`, stored as they are: I32 or I64, decoded to 32 bits."""

    below: int = 1 << 31

    def decode(self, stored: Stored, index: int | None, rows: range | None) -> Tensor:
        """See `Codec`. CheckpointError for a number that is out of reach."""
        values = read_part(stored.parts[""], index, rows)
        wrong = (values < 0) | (values >= self.below)
        if wrong.any():
            first = int(values[wrong][0])
            raise damaged(stored.name, f"has a {first}, where 0 to {self.below - 1} can be")
        return values.to(torch.int32)


PLAIN = Plain()


WHOLE = ("I32", "I64")
"""Types of whole numbers that stand for themselves."""


def whole_numbers(stored: Stored, below: int) -> Stored:
    """A tensor of whole numbers under `below`."""
    return replace(stored, codec=WholeNumbers(below=below))


def plain(ref: TensorRef) -> Stored:
    """A tensor that is stored as it is."""
    return Stored(ref.name, ref.shape, ref.dtype, {"": ref}, PLAIN)
