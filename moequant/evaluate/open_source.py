"""Whatever can be compared, opened as weights of the model that it claims to be.

Decoders are other people's: gguf-py's for GGUF, the compressed-tensors package's for its folders.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGUFReader
from torch import Tensor

from moequant import families
from moequant.checkpoint import Checkpoint, load, open_checkpoint
from moequant.containers.gguf.header import read_header
from moequant.containers.gguf.tokenizer.spec import read_tokenizer
from moequant.errors import CheckpointError, VerifyError
from moequant.escape import shown
from moequant.forward.model import Provider
from moequant.statistics.store import identity
from moequant.values import Weight

SAME = (
    "block_count",
    "embedding_length",
    "expert_count",
    "expert_used_count",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.layer_norm_rms_epsilon",
    "rope.freq_base",
)
"""GGUF keys that versions of one model have in common; a key that a file lacks is not compared."""

FOREIGN_TOKENS = 0.01
"""Tools spell a few special tokens differently; more than this share of others is another vocabulary."""


@dataclass(frozen=True, slots=True)
class Source:
    """A version of a model: where and what it is, its bytes, the type of every weight.

    `provider` loads its weights; None when another engine runs it.
    """

    path: Path
    kind: str
    provider: Provider | None
    bytes: int
    types: Mapping[str, str]

    @property
    def name(self) -> str:
        """What tables call it."""
        return shown(self.path)


def open_model(paths: Sequence[Path], model: Path | None) -> Checkpoint:
    """How the compared models compute: `model`, or the first path that is an unquantized folder.

    CheckpointError when there is none: GGUF files alone do not say what transformers needs.
    """
    if model is not None:
        return open_checkpoint(model)
    for path in paths:
        if not path.exists():
            raise CheckpointError(f"{path}: no such file or folder")
        if path.is_dir() and _method(path) is None:
            return open_checkpoint(path)
    raise CheckpointError(
        f"{paths[0]}: the unquantized folder of the model is needed to run it; name it with --model "
        "(config.json, headers and tokenizer are read), or use --engine llama.cpp"
    )


def open_source(path: Path, checkpoint: Checkpoint) -> Source:
    """A folder or a GGUF file as weights of `checkpoint`.

    Raises CheckpointError for what is neither, and VerifyError when it is another model.
    """
    if path.is_dir():
        method = _method(path)
        return _folder(path, checkpoint) if method is None else _quantized(path, method, checkpoint)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file or folder")
    return _gguf(path, checkpoint)


def open_files(paths: Sequence[Path]) -> tuple[Source, ...]:
    """GGUF files of one model by their headers, for a runtime that decodes them itself.

    Raises CheckpointError for what is no GGUF file, VerifyError when one is another model than the first.
    """
    for path in paths:
        if path.is_dir():
            raise CheckpointError(
                f"{path}: llama.cpp runs GGUF files; convert it with --type BF16 or F32 first"
            )
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file")
    headers = [read_header(path) for path in paths]
    first, vocabulary = headers[0], GgufFile(paths[0]).tokens()
    for header in headers[1:]:
        _same_metadata(header.path, header.metadata, first.path, first.metadata)
        _same_texts(header.path, GgufFile(header.path).tokens(), first.path, vocabulary)
    return tuple(
        Source(one.path, "GGUF", None, one.file_bytes, {each.name: each.type for each in one.tensors})
        for one in headers
    )


def _method(path: Path) -> str | None:
    """How a folder is quantized; None when it is not."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        quantization = config.get("quantization_config")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: neither a GGUF file nor a model folder with a config.json ({error})"
        ) from None
    return None if quantization is None else str(quantization.get("quant_method", "unknown"))


def _folder(path: Path, checkpoint: Checkpoint) -> Source:
    other = checkpoint if path == checkpoint.path else open_checkpoint(path)
    _same_model(path, identity(other), checkpoint)
    _same_tokens(path, checkpoint)
    theirs = {weight.name: weight for weight in other.weights}
    for weight in checkpoint.weights:
        _same_shape(path, weight, theirs[weight.name].shape if weight.name in theirs else None)
    if extra := sorted(theirs.keys() - {weight.name for weight in checkpoint.weights}):
        raise VerifyError(f"{path}: {extra[0]} is not in {checkpoint.path}; is one tied and the other not?")
    types = {name: weight.sources[0].ref.dtype for name, weight in theirs.items()}
    return Source(path, "checkpoint", lambda weight: load(theirs[weight.name]), other.source_bytes, types)


def _quantized(path: Path, method: str, checkpoint: Checkpoint) -> Source:
    """A folder of packed integers, decoded by the package of its layout."""
    # the decoder is an optional package
    from moequant.containers.folders import compressed_tensors, gptq

    openers = {"compressed-tensors": compressed_tensors.open_folder, "gptq": gptq.open_folder}
    if method not in openers:
        raise CheckpointError(f"{path}: quantized as {method}; known here: {', '.join(openers)}")
    found = openers[method](path)
    raw = json.loads((path / "config.json").read_text(encoding="utf-8"))
    raw.pop("quantization_config")
    config = families.normalized(found.family, raw)
    theirs: dict[str, Any] = {key: value for key, _, value in families.metadata(found.family, config)}
    theirs |= {"general.architecture": found.family.gguf_arch, "vocab_size": config["vocab_size"]}
    _same_model(path, theirs, checkpoint)
    _same_tokens(path, checkpoint)
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    types = {
        weight.name: method if found.is_quantized(weight) else weight.sources[0].ref.dtype
        for weight in checkpoint.weights
    }
    return Source(path, method, found.load, size, types)


def _gguf(path: Path, checkpoint: Checkpoint) -> Source:
    header = read_header(path)
    shapes = {tensor.name: tensor.shape for tensor in header.tensors}
    vocabulary = shapes.get("token_embd.weight", (None,))[0]
    _same_model(path, {**header.metadata, "vocab_size": vocabulary}, checkpoint)
    decoded = GgufFile(path)
    _same_vocabulary(path, decoded.tokens(), checkpoint)
    for weight in checkpoint.weights:
        _same_shape(path, weight, shapes.get(weight.name))
    if extra := sorted(shapes.keys() - {weight.name for weight in checkpoint.weights}):
        raise VerifyError(f"{path}: tensor {extra[0]} is unknown to {checkpoint.path}; is it the same model?")
    types = {tensor.name: tensor.type for tensor in header.tensors}
    return Source(path, "GGUF", decoded.load, header.file_bytes, types)


class GgufFile:
    """A GGUF file, all shards of it, decoded by gguf-py an expert at a time; data is read, not mapped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._readers = [GGUFReader(shard) for shard in shards(path)]
        except (OSError, ValueError, IndexError) as error:
            raise VerifyError(f"{path}: not a readable GGUF file ({error})") from None
        self._tensors = {
            tensor.name: (shard, tensor)
            for shard, reader in zip(shards(path), self._readers, strict=True)
            for tensor in reader.tensors
        }

    def tokens(self) -> list[str]:
        """The vocabulary's texts; empty when the file has none."""
        field = self._readers[0].fields.get("tokenizer.ggml.tokens")
        return [] if field is None else list(field.contents())

    def load(self, weight: Weight) -> Tensor:
        """Decoded values, f32, shape `weight.shape`: a `routing.model.Provider`."""
        shard, tensor = self._tensors[weight.name]
        out = torch.empty(weight.n_experts, *weight.shape[-2:])
        rows = prod(weight.shape[:-1]) // weight.n_experts
        size = int(tensor.n_bytes) // weight.n_experts
        for expert in range(weight.n_experts):
            data = np.fromfile(shard, np.uint8, size, offset=int(tensor.data_offset) + expert * size)
            if len(data) < size:
                raise VerifyError(f"{shard}: ends inside tensor {weight.name}; is the download complete?")
            try:
                values = gguf.dequantize(data.reshape(rows, -1), tensor.tensor_type)
            except NotImplementedError:
                raise VerifyError(
                    f"{self.path}: gguf-py cannot decode {tensor.tensor_type.name} ({weight.name})"
                ) from None
            out[expert] = torch.from_numpy(np.ascontiguousarray(values, np.float32)).view(out.shape[1:])
        return out.view(weight.shape)


def shards(path: Path) -> list[Path]:
    """All files of a split GGUF by the name of its first; `read_header` has checked that they are there."""
    found = re.fullmatch(r"(.*-)00001(-of-(\d{5})\.gguf)", path.name)
    if found is None:
        return [path]
    return [path.with_name(f"{found[1]}{number:05d}{found[2]}") for number in range(1, int(found[3]) + 1)]


def _same_model(path: Path, theirs: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """VerifyError naming the first thing that makes `theirs`, by GGUF key, another model."""
    _same_metadata(path, theirs, checkpoint.path, identity(checkpoint))


def _same_metadata(path: Path, theirs: Mapping[str, Any], base: Path, mine: Mapping[str, Any]) -> None:
    """VerifyError naming the first of the keys in SAME, or architecture or vocabulary, that differs."""
    arch = mine["general.architecture"]
    for key in ("general.architecture", "vocab_size", *(f"{arch}.{name}" for name in SAME)):
        one, two = mine.get(key), theirs.get(key)
        if one is not None and two is not None and not _equal(one, two):
            raise VerifyError(f"{path}: another model than {base}: {key} is {two}, not {one}")


def _equal(one: Any, two: Any) -> bool:
    if isinstance(one, float) or isinstance(two, float):
        return math.isclose(float(one), float(two), rel_tol=1e-5)
    return bool(one == two)


def _same_shape(path: Path, weight: Weight, shape: tuple[int, ...] | None) -> None:
    if shape is None:
        raise VerifyError(f"{path}: tensor {weight.name} is missing")
    if shape != weight.shape:
        raise VerifyError(f"{path}: {weight.name} is {list(shape)}, expected {list(weight.shape)}")


def _same_tokens(path: Path, checkpoint: Checkpoint) -> None:
    """The tokenizers of two folders, when the other one has any."""
    if path != checkpoint.path and (path / "tokenizer.json").is_file():
        _same_vocabulary(path, read_tokenizer(path).tokens, checkpoint)


def _same_vocabulary(path: Path, theirs: Sequence[str], checkpoint: Checkpoint) -> None:
    _same_texts(path, theirs, checkpoint.path, read_tokenizer(checkpoint.path).tokens)


def _same_texts(path: Path, theirs: Sequence[str], base: Path, mine: Sequence[str]) -> None:
    """VerifyError when the same ids mean other texts."""
    pairs = list(zip(mine, theirs, strict=False))
    foreign = [number for number, (one, two) in enumerate(pairs) if one != two]
    if len(foreign) > FOREIGN_TOKENS * len(pairs):
        first = foreign[0]
        raise VerifyError(
            f"{path}: another vocabulary than {base}: {len(foreign)} of {len(pairs)} tokens "
            f"differ, token {first} is {theirs[first]!r}, not {mine[first]!r}"
        )
