"""CRC-32 of every expert of every tensor, kept in the GGUF file itself: `moequant check` names what changed.

The header is written before the data is known, so the writer reserves room and fills it at the end:

    reserve(writer, slices)  →  header and data  →  record(path, checksums)

One u32 array, tensors in file order, experts in order within them; llama.cpp skips keys it does not know.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from gguf import GGUFReader, GGUFValueType, GGUFWriter

from moequant.errors import VerifyError

KEY = "moequant.crc32"

Bytes = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]


def of_slices(data: Bytes, slices: int) -> tuple[int, ...]:
    """CRC-32 of each of `slices` equal parts of a tensor's bytes: its experts, or 1 for the whole."""
    flat = data.reshape(slices, -1)
    return tuple(zlib.crc32(part.data) for part in flat)


def reserve(writer: GGUFWriter, slices: int) -> None:
    """Room for that many checksums in the header, before it is written."""
    writer.add_key_value(KEY, [0] * slices, GGUFValueType.ARRAY, sub_type=GGUFValueType.UINT32)


def record(path: Path, checksums: Mapping[str, tuple[int, ...]]) -> None:
    """Fill the reserved room of a finished file with the checksums of all its tensors."""
    reader = GGUFReader(path, "r+")
    field = reader.get_field(KEY)
    values = [value for tensor in reader.tensors for value in checksums[tensor.name]]
    if field is None or len(field.data) != len(values):
        raise VerifyError(f"{path}: no room for {len(values)} checksums was reserved")
    for part, value in zip(field.data, values, strict=True):
        field.parts[part][0] = value
    reader.data.flush()


def recorded(path: Path) -> dict[str, tuple[int, ...]] | None:
    """{tensor: a checksum for each expert, or one}, None when the file holds none."""
    reader = GGUFReader(path)
    field = reader.get_field(KEY)
    if field is None:
        return None
    values = iter(int(field.parts[part][0]) for part in field.data)
    counts = {tensor.name: int(tensor.shape[2]) if len(tensor.shape) == 3 else 1 for tensor in reader.tensors}
    if sum(counts.values()) != len(field.data):
        raise VerifyError(
            f"{path}: {len(field.data)} checksums for {sum(counts.values())} experts and tensors"
        )
    return {name: tuple(next(values) for _ in range(count)) for name, count in counts.items()}
