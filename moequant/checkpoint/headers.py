"""The header of a safetensors file, read once, with the format's full rules; and the tensors of a folder.

The rules are those of the format's own page (huggingface.co/docs/safetensors): offsets cover the data
without gap or overlap, and every tensor's bytes are its shape times its type.
"""

from __future__ import annotations

import json
from math import prod
from typing import Any

from moequant.checkpoint.folder import INDEX, Folder, files_of_model, read_index
from moequant.errors import CheckpointError
from moequant.files.read import unreadable
from moequant.values import File, TensorRef

MAX_HEADER = 100_000_000
"""The format's own limit on its JSON header, in bytes."""

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
"""Bits of a number of each of the format's types."""


def read_headers(folder: Folder) -> dict[str, TensorRef]:
    """All tensors of a folder by name, the index checked against the shards."""
    weight_map = read_index(folder.path)
    shards = files_of_model(folder.weights, weight_map)
    if not shards:
        raise CheckpointError(f"{folder.path}: no *.safetensors file; other weight formats are not read")
    if missing := [name for name in shards if name not in folder.weights]:
        raise CheckpointError(
            f"{folder.path}: shard {missing[0]} is missing ({len(missing)} of {len(shards)} named in "
            f"{INDEX}); is the download complete?"
        )
    refs: dict[str, TensorRef] = {}
    for name in shards:
        for ref in read_header(folder.weights[name]):
            if ref.name in refs:
                raise CheckpointError(
                    f"{folder.path}: tensor {ref.name} is in two shards, {name} and "
                    f"{refs[ref.name].file.name}"
                )
            refs[ref.name] = ref
    named = {tensor: name for tensor, name in weight_map.items() if name in shards}
    absent = sorted(t for t, name in named.items() if t not in refs or refs[t].file.name != name)
    if absent:
        raise CheckpointError(
            f"{folder.path}: {absent[0]} is in the index but not in {weight_map[absent[0]]}; download all "
            "files of one revision"
        )
    return refs


def read_header(path: File) -> tuple[TensorRef, ...]:
    """The tensors of one safetensors file, in the order of their bytes. CheckpointError for what breaks a
    rule of the format."""
    size = path.bytes
    try:
        with path.open() as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MAX_HEADER, size - 8):
                raise CheckpointError(
                    f"{path}: not a complete safetensors file ({size} bytes); download it again"
                )
            header = json.loads(file.read(length), object_pairs_hook=_unique)
    except OSError as error:
        raise unreadable(path, error) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: safetensors header is damaged ({error})") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: safetensors header is damaged (no JSON object)")
    header.pop("__metadata__", None)
    refs = sorted(
        (_ref(path, name, entry, 8 + length) for name, entry in header.items()), key=lambda r: r.begin
    )
    at = 8 + length
    for ref in refs:
        if ref.begin != at:
            what = "overlaps the tensor before it" if ref.begin < at else "leaves a gap before it"
            raise CheckpointError(f"{path}: tensor {ref.name} {what}; the file is damaged")
        at = ref.end
    if at != size:
        what = "truncated" if at > size else "has bytes that no tensor names"
        raise CheckpointError(f"{path}: {what}, {size} bytes of {at}; is the download complete?")
    return tuple(refs)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return found


def _ref(path: File, name: str, entry: Any, start: int) -> TensorRef:
    """One entry of a header, its types and its size checked."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = (*shape, begin, end)
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(
            f"{path}: tensor {name}: dtype, shape and two data_offsets were expected; the header is damaged"
        ) from None
    if not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 63 for n in numbers):
        raise CheckpointError(f"{path}: tensor {name}: shape or offsets are no sizes; the header is damaged")
    if not isinstance(dtype, str) or dtype not in BITS:
        raise CheckpointError(f"{path}: tensor {name}: dtype {dtype!r} is none of the format's")
    if end - begin != prod(shape) * BITS[dtype] // 8:
        raise CheckpointError(
            f"{path}: tensor {name}: {list(shape)} of {dtype} are {prod(shape) * BITS[dtype] // 8} bytes, "
            f"its offsets say {end - begin}; the header is damaged"
        )
    return TensorRef(name, tuple(shape), dtype, path, start + begin, start + end)
