"""GGUF: the file llama.cpp loads, written once, front to back, and never half-finished under its own name.

gguf-py lays out the header; the packed bytes are ours.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterable
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
from moequant.errors import OutputError, VerifyError
from moequant.files import check_space
from moequant.values import Packed, Plan


def file_bytes(exported: Exported, tokenizer: TokenizerSpec, plan: Plan, provenance: dict[str, str]) -> int:
    """The exact size that `write` will produce: header laid out for real, weights added up."""
    writer, header = _lay_out(exported, tokenizer, plan, provenance), io.BytesIO()
    # As if it had opened its file: a header in memory needs no disk that may be full.
    writer.fout, writer.state = [header], WriterState.EMPTY
    _write_header(writer, None)
    return _aligned(header.tell()) + sum(_aligned(choice.bytes) for choice in plan.choices)


def check_target(path: Path, size: int) -> None:
    """OutputError when a file of `size` bytes cannot be put at `path`: said before any work is done."""
    if path.suffix != ".gguf":
        raise OutputError(f"{path}: the output must be named *.gguf")
    check_space(path.absolute().parent, size)


def write(
    path: Path,
    exported: Exported,
    tokenizer: TokenizerSpec,
    plan: Plan,
    packed: Iterable[Packed],
    provenance: dict[str, str],
) -> Written:
    """Write the plan's weights in order to `path`.

    `packed` must yield the plan's weights in the plan's order; each is written as it
    comes and not kept. Raises OutputError when the disk refuses.
    """
    sums: dict[str, int] = {}
    slices: dict[str, tuple[int, ...]] = {}
    writer = _lay_out(exported, tokenizer, plan, provenance)
    try:
        _write_header(writer, path)
        for item, choice in zip(packed, plan.choices, strict=True):
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
        raise OutputError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        writer.close()
    checksums.record(path, slices)
    return Written(path, path.stat().st_size, sums)


def _lay_out(
    exported: Exported, tokenizer: TokenizerSpec, plan: Plan, provenance: dict[str, str]
) -> GGUFWriter:
    """All keys and tensor descriptions of the file, nothing written yet."""
    writer = GGUFWriter(None, exported.arch)
    writer.add_type("model")
    writer.add_quantization_version(2)
    writer.add_file_type(FILE_TYPES[plan.preset])
    for key in exported.keys:
        _add(writer, f"{exported.arch}.{key.name}", key)
    for name, value in provenance.items():
        writer.add_string(name, value)
    add_tokenizer(writer, tokenizer, exported.checkpoint.shape.vocab)
    checksums.reserve(writer, sum(_slices(shape) for shape in exported.shapes.values()))
    for choice in plan.choices:
        writer.add_tensor_info(
            exported.names[choice.weight],
            exported.shapes[choice.weight],
            np.dtype(np.float32),
            choice.bytes,
            raw_dtype=GGMLQuantizationType[choice.format],
        )
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
