"""GGUF: the file llama.cpp loads, written once, front to back, and never half-finished under its own name.

gguf-py lays out the header and is the independent decoder of what we wrote; the packed
bytes are ours.
"""

from __future__ import annotations

import shutil
import tempfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from torch import Tensor

from moequant import families
from moequant.checkpoint import Checkpoint
from moequant.containers.gguf import checksums
from moequant.containers.gguf.presets import FILE_TYPES
from moequant.containers.gguf.sizes import ALIGNMENT
from moequant.containers.gguf.tokenizer.spec import TokenizerSpec, add_tokenizer
from moequant.errors import OutputError, VerifyError
from moequant.files import check_output
from moequant.values import Packed, Plan, Weight


@dataclass(frozen=True, slots=True)
class Written:
    """A finished file: its size in bytes and the CRC-32 of every tensor's data, by name."""

    path: Path
    bytes: int
    checksums: dict[str, int]


def file_bytes(
    checkpoint: Checkpoint, tokenizer: TokenizerSpec, plan: Plan, provenance: dict[str, str]
) -> int:
    """The exact size that `write` will produce: header laid out for real, weights added up."""
    with tempfile.TemporaryDirectory(prefix="moequant-") as folder:
        path = Path(folder) / "header.gguf"
        writer = _lay_out(checkpoint, tokenizer, plan, provenance)
        _write_header(writer, path)
        writer.close()
        header = path.stat().st_size
    return _aligned(header) + sum(_aligned(choice.bytes) for choice in plan.choices)


def check_target(path: Path, size: int, overwrite: bool) -> None:
    """OutputError when a file of `size` bytes cannot be put at `path`: said before any work is done."""
    if path.suffix != ".gguf":
        raise OutputError(f"{path}: the output must be named *.gguf")
    check_output(path, overwrite)
    folder = path.parent
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OutputError(f"{folder}: {size:,} bytes are needed, {free:,} are free")


def write(
    path: Path,
    checkpoint: Checkpoint,
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
    writer = _lay_out(checkpoint, tokenizer, plan, provenance)
    try:
        _write_header(writer, path)
        for item, choice in zip(packed, plan.choices, strict=True):
            if item.weight.name != choice.weight or item.data.numel() != choice.bytes:
                raise VerifyError(
                    f"{item.weight.name}: packed as {item.data.numel()} bytes, planned {choice}"
                )
            data = item.data.reshape(-1).contiguous().cpu().numpy()
            sums[choice.weight] = zlib.crc32(data.data)
            slices[choice.weight] = checksums.of_slices(data, item.weight.n_experts)
            writer.write_tensor_data(data)
        writer.flush()
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        writer.close()
    checksums.record(path, slices)
    return Written(path, path.stat().st_size, sums)


def _lay_out(
    checkpoint: Checkpoint, tokenizer: TokenizerSpec, plan: Plan, provenance: dict[str, str]
) -> GGUFWriter:
    """All keys and tensor descriptions of the file, nothing written yet."""
    writer = GGUFWriter(None, checkpoint.family.gguf_arch)
    writer.add_type("model")
    writer.add_name(checkpoint.path.resolve().name)
    writer.add_quantization_version(2)
    writer.add_file_type(FILE_TYPES[plan.preset])
    for key, kind, value in families.metadata(checkpoint.family, checkpoint.config):
        add = {
            "u32": writer.add_uint32,
            "f32": writer.add_float32,
            "bool": writer.add_bool,
            "str": writer.add_string,
        }
        add[kind](key, value)
    for key, value in provenance.items():
        writer.add_string(key, value)
    add_tokenizer(writer, tokenizer, int(checkpoint.config["vocab_size"]))
    checksums.reserve(writer, sum(weight.n_experts for weight in checkpoint.weights))
    shapes = {weight.name: weight.shape for weight in checkpoint.weights}
    for choice in plan.choices:
        writer.add_tensor_info(
            choice.weight,
            shapes[choice.weight],
            np.dtype(np.float32),
            choice.bytes,
            raw_dtype=GGMLQuantizationType[choice.format],
        )
    return writer


def _write_header(writer: GGUFWriter, path: Path) -> None:
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


class GgufWeights:
    """A GGUF file's weights, decoded by gguf-py: independent of our own decoders."""

    def __init__(self, path: Path) -> None:
        try:
            reader = GGUFReader(path)
        except (OSError, ValueError, IndexError) as error:
            raise VerifyError(f"{path}: not a readable GGUF file ({error})") from error
        self.path = path
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}

    def format_of(self, name: str) -> str:
        """The ggml type of a tensor."""
        return str(self.tensors[name].tensor_type.name)

    def data(self, name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        """The packed bytes of a tensor, [rows, row_bytes]: read, not mapped, so that they can be let go."""
        tensor = self.tensors[name]
        raw = np.fromfile(self.path, np.uint8, int(tensor.n_bytes), offset=int(tensor.data_offset))
        return raw.reshape(prod(int(n) for n in tensor.shape[1:]), -1)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape in torch order."""
        return tuple(int(n) for n in reversed(self.tensors[name].shape))

    def load(self, weight: Weight) -> Tensor:
        """Decoded values, f32, shape `weight.shape`: a `routing.model.Provider`."""
        if weight.name not in self.tensors:
            raise VerifyError(f"{self.path}: tensor {weight.name} is missing")
        if self.shape(weight.name) != weight.shape:
            raise VerifyError(
                f"{self.path}: {weight.name} is {self.shape(weight.name)}, expected {weight.shape}"
            )
        values = gguf.dequantize(self.data(weight.name), self.tensors[weight.name].tensor_type)
        return torch.from_numpy(np.array(values, dtype=np.float32)).reshape(weight.shape)
