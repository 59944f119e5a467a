"""GGUF: the file llama.cpp loads, written once, front to back, and never half-finished under its own name.

gguf-py lays out the header, of several parts as of one; the packed bytes are ours.
"""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter, size_label
from gguf.gguf_writer import WriterState

from moequant.checkpoint import Checkpoint
from moequant.containers.about import metadata
from moequant.containers.base import Written
from moequant.containers.gguf import checksums
from moequant.containers.gguf.export import Exported
from moequant.containers.gguf.families import Key
from moequant.containers.gguf.presets import FILE_TYPES
from moequant.containers.gguf.sizes import ALIGNMENT
from moequant.containers.gguf.tokenizer.spec import TokenizerSpec, add_tokenizer
from moequant.errors import CheckpointError, OutputError, VerifyError
from moequant.files import part_names, unwritable
from moequant.files.parts import MOST, PART
from moequant.values import Packed, Plan

PART_HEADER = 192
"""Bytes that a part adds to a file, at most: its magic and counts, three keys, and padding."""


@dataclass(frozen=True, slots=True)
class Content:
    """What a file holds beside its weights; `provenance` are keys that say what made it."""

    exported: Exported
    tokenizer: TokenizerSpec
    provenance: Mapping[str, str]


def part_bytes(content: Content, plan: Plan, split: int | None = None) -> tuple[int, ...]:
    """The exact sizes of the files that `write` will produce: headers laid out for real, weights added up."""
    writer = _lay_out(content, plan, split)
    headers = [io.BytesIO() for _ in writer.tensors]
    # As if it had opened its files: headers in memory need no disk that may be full.
    writer.fout, writer.state = headers, WriterState.EMPTY
    _write_header(writer, None)
    return tuple(
        _aligned(header.tell()) + sum(_aligned(tensor.nbytes) for tensor in tensors.values())
        for header, tensors in zip(headers, writer.tensors, strict=True)
    )


def outline(path: Path, content: Content, plan: Plan) -> None:
    """The file with a hole where its weights will be: it has the size, and takes no room on disk."""
    writer = _lay_out(content, plan, None)
    _write_header(writer, path)
    writer.close()
    (whole,) = part_bytes(content, plan)
    os.truncate(path, whole)


def check_target(path: Path) -> None:
    """OutputError when no file can have that name: said before any work is done."""
    if path.suffix != ".gguf":
        raise OutputError(f"{path}: the output must be named *.gguf")
    if part := PART.fullmatch(path.name):
        raise OutputError(
            f"{path}: is the name of a part; give {part[1]}.gguf, and --split-size for a file in parts"
        )


def write(
    path: Path, content: Content, plan: Plan, packed: Iterable[Packed], split: int | None = None
) -> Written:
    """Write the plan's weights in order to `path`, or to its `part_names` of up to `split` bytes of weights.

    `packed` must yield the plan's weights in the plan's order; each is written as it
    comes and not kept. Raises OutputError when the disk refuses.
    """
    sums: dict[str, int] = {}
    slices: dict[str, tuple[int, ...]] = {}
    exported, writer = content.exported, _lay_out(content, plan, split)
    files = part_names(path, len(writer.tensors))
    try:
        _write_header(writer, path)
        for item, choice in zip(_named(packed, exported.names), plan.choices, strict=True):
            if item.weight.name != choice.weight or item.data.numel() != choice.bytes:
                raise VerifyError(
                    f"{item.weight.name}: packed as {item.data.numel()} bytes, planned {choice}"
                )
            data = item.data.reshape(-1).contiguous().cpu().numpy()
            sums[choice.weight] = zlib.crc32(data.data)
            name = exported.names[choice.weight]
            slices[name] = checksums.of_slices(data, _slices(exported.shapes[choice.weight]))
            writer.write_tensor_data(data)
        writer.flush()
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        writer.close()
    checksums.record(files[0], slices)
    return Written(files[0], sum(file.stat().st_size for file in files), sums)


def _named(packed: Iterable[Packed], names: Mapping[str, str]) -> Iterator[Packed]:
    """The same; an error about a weight also says what the tensor is called in the file."""
    try:
        yield from packed
    except CheckpointError as error:
        weight, colon, rest = str(error).partition(": ")
        if weight not in names or not colon:
            raise
        raise type(error)(f"{weight} ({names[weight]}): {rest}") from error


def _lay_out(content: Content, plan: Plan, split: int | None) -> GGUFWriter:
    """All keys and tensor descriptions of the file, nothing written yet. OutputError for more parts than
    llama.cpp counts."""
    exported = content.exported
    writer = GGUFWriter(None, exported.arch, split_max_size=split or 0)
    writer.add_type("model")
    writer.add_quantization_version(2)
    writer.add_file_type(FILE_TYPES[plan.preset])
    for key in exported.keys:
        _add(writer, f"{exported.arch}.{key.name}", key)
    for name, value in content.provenance.items():
        writer.add_string(name, value)
    add_tokenizer(writer, content.tokenizer, exported.checkpoint.shape.vocab)
    checksums.reserve(writer, sum(_slices(shape) for shape in exported.shapes.values()))
    for choice in plan.choices:
        writer.add_tensor_info(
            exported.names[choice.weight],
            exported.shapes[choice.weight],
            np.dtype(np.float32),
            choice.bytes,
            raw_dtype=GGMLQuantizationType[choice.format],
        )
    if len(writer.tensors) > MOST:
        raise OutputError(f"{len(writer.tensors):,} parts are more than llama.cpp reads; give a larger size")
    if len(writer.tensors) == 1:
        writer.split_max_size = 0  # gguf-py would warn that one part is enough
    _describe(writer, exported.checkpoint)
    return writer


def _describe(writer: GGUFWriter, checkpoint: Checkpoint) -> None:
    """What the model is called and whose it is, as llama.cpp's converter says it of these tensors."""
    counts = writer.get_total_parameter_count()
    told = metadata(checkpoint, counts[0])
    told.size_label = told.size_label or size_label(*counts)
    told.set_gguf_meta_model(writer)


_SCALARS = {
    "u32": GGUFValueType.UINT32,
    "u64": GGUFValueType.UINT64,
    "f32": GGUFValueType.FLOAT32,
    "bool": GGUFValueType.BOOL,
    "str": GGUFValueType.STRING,
}


def _add(writer: GGUFWriter, name: str, key: Key) -> None:
    """One key, of a number or of an array of them."""
    kind = _SCALARS[key.kind.removesuffix("s")]
    if key.kind.endswith("s"):
        writer.add_key_value(name, list(key.value), GGUFValueType.ARRAY, sub_type=kind)
    else:
        writer.add_key_value(name, key.value, kind)


def _slices(shape: tuple[int, ...]) -> int:
    """Parts of a tensor with checksums of their own: the matrices of a stack."""
    return shape[0] if len(shape) == 3 else 1


def _write_header(writer: GGUFWriter, path: Path | None) -> None:
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
