"""CRC-32 of every expert of every tensor, kept in the GGUF file itself: `moequant check` names what changed.

The header is written before the data is known, so the writer reserves room and fills it at the end:

    reserve(writer, slices)  →  header and data  →  record(path, checksums)

One u32 array, tensors in file order, experts in order within them; llama.cpp skips keys it does not know.
The same bytes under another type are other numbers, so a second array has one checksum of what the header
says.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from gguf import GGUFValueType, GGUFWriter

from moequant.containers.gguf.header import TensorInfo
from moequant.containers.gguf.read import Bytes, GgufFile
from moequant.errors import VerifyError
from moequant.files import unwritable

KEY = "moequant.crc32"

HEADER = "moequant.crc32.header"
"""The key of the header's checksum."""

_FREE = ("general.", "moequant.", "split.", "tokenizer.chat_template")
"""Keys by whose beginning nothing is computed: people name files, cut them, and mend templates."""

_ALWAYS = "general.architecture"


def of_slices(data: Bytes, slices: int) -> tuple[int, ...]:
    """CRC-32 of each of `slices` equal parts of a tensor's bytes: its experts, or 1 for the whole."""
    flat = data.reshape(slices, -1)
    return tuple(zlib.crc32(part.data) for part in flat)


def reserve(writer: GGUFWriter, slices: int) -> None:
    """Room for that many checksums in the header, before it is written."""
    for key, count in ((KEY, slices), (HEADER, 1)):
        writer.add_key_value(key, [0] * count, GGUFValueType.ARRAY, sub_type=GGUFValueType.UINT32)


def record(path: Path, checksums: Mapping[str, tuple[int, ...]]) -> None:
    """Fill the reserved room of a finished file with the checksums of all its tensors.

    Raises VerifyError when there is no such room, OutputError when the disk refuses.
    """
    file = GgufFile(path)
    values = {KEY: [value for name in file.tensors for value in checksums[name]], HEADER: [of_header(file)]}
    rooms = {key: file.header.arrays.get(key) for key in values}
    for key, room in rooms.items():
        if room is None or room.kind is not GGUFValueType.UINT32 or room.count != len(values[key]):
            raise VerifyError(f"{path}: no room for {len(values[key])} checksums was reserved")
    try:
        with path.open("r+b") as out:
            for key, room in rooms.items():
                assert room is not None
                out.seek(room.offset)
                out.write(np.array(values[key], "<u4").tobytes())
    except OSError as error:
        raise unwritable(path, error) from error


def recorded(file: GgufFile) -> dict[str, tuple[int, ...]] | None:
    """{tensor: a checksum for each expert, or one}, None when the file holds none.

    Raises VerifyError when they are not as many as its experts and tensors.
    """
    if KEY not in file.header.arrays:
        return None
    found = file.header.array(KEY)
    counts = {tensor.name: _slices(tensor) for tensor in file.header.tensors}
    if sum(counts.values()) != len(found):
        raise VerifyError(
            f"{file.path}: {len(found)} checksums for {sum(counts.values())} experts and tensors"
        )
    values = iter(found)
    return {name: tuple(next(values) for _ in range(count)) for name, count in counts.items()}


def of_header(file: GgufFile) -> int:
    """CRC-32 of what a header says of numbers: keys, tokens, and every tensor's type and shape, in the order
    of their names."""
    header, found = file.header, 0
    kept = {key for key in header.metadata if not key.startswith(_FREE)} | {_ALWAYS}
    said = [f"{key}={header.metadata.get(key)!r}" for key in sorted(kept - header.arrays.keys())]
    said += [f"{each.name}={each.type}{each.shape}" for each in sorted(header.tensors, key=lambda t: t.name)]
    for text in said:
        found = zlib.crc32(text.encode("utf-8", "surrogateescape"), found)
    for key in sorted(key for key in header.arrays if not key.startswith(_FREE)):
        array = header.arrays[key]
        found = zlib.crc32(f"{key}={array.kind.name}{array.count}".encode(), found)
        found = zlib.crc32(array.raw(), found)
    return found


def header_changed(file: GgufFile) -> bool:
    """Whether a header says something else than was written; False where nothing is recorded."""
    return HEADER in file.header.arrays and file.header.array(HEADER) != [of_header(file)]


def _slices(tensor: TensorInfo) -> int:
    return tensor.shape[0] if len(tensor.shape) == 3 else 1
