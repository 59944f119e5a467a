"""Whatever can be compared, opened as weights of the model that it claims to be.

Decoders are other people's: gguf-py's for GGUF, the compressed-tensors package's for its folders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moequant.checkpoint import Checkpoint, Folder, load, open_checkpoint
from moequant.checkpoint.codecs.declared import read_config
from moequant.checkpoint.codecs.inputs import Inputs, cache_of
from moequant.checkpoint.open import quantization_of
from moequant.containers.gguf.export import export
from moequant.containers.gguf.read import GgufFile, read_header
from moequant.containers.gguf.same import (
    TOKENS,
    check_same,
    same_metadata,
    same_texts,
    same_values,
    that_runs,
)
from moequant.containers.gguf.weights import GgufWeights
from moequant.containers.opened import open_model
from moequant.errors import CheckpointError, VerifyError
from moequant.escape import shown
from moequant.evaluate.folder_inputs import folder_inputs, stored_codes
from moequant.files import RECORD
from moequant.files.read import read_json
from moequant.forward.model import Provider
from moequant.hub import GgufModel
from moequant.hub.fetch import headers
from moequant.statistics.store import identity, identity_of
from moequant.text.rows import vocabulary
from moequant.values import Weight

SAME_CONFIG = (
    "family",
    "num_hidden_layers",
    "hidden_size",
    "num_local_experts",
    "n_routed_experts",
    "num_experts_per_tok",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_parameters",
    "vocab_size",
)
"""Config keys that versions of one model have in common; a key that one lacks is not compared."""

PACKED = ("compressed-tensors", "gptq", "awq")
"""Layouts of folders whose own packages decode them: versions of a model, not the model."""


@dataclass(frozen=True, slots=True)
class Source:
    """A version of a model: where and what it is, its bytes, the type of every weight.

    `provider` loads its weights; None when another engine runs it. `inputs` are what becomes of the inputs of
    every weight of a quantized folder, None where that follows from types, or nobody asked. `cache` is what
    its config says that keys and values are kept as; they are compared as they are.
    """

    path: Path
    kind: str
    provider: Provider | None
    bytes: int
    types: Mapping[str, str]
    inputs: Mapping[str, Inputs] | None = None
    cache: str = ""

    @property
    def name(self) -> str:
        """What tables call it."""
        return shown(self.path)


def model_of(paths: Sequence[Path], model: Folder | None) -> Checkpoint:
    """How the compared models compute: `model`, or the first path that is an unquantized folder, or a GGUF
    file as the first path with config.json and tokenizer beside it. A `model` without weights has them in
    that file.

    CheckpointError when there is none: GGUF files alone do not say what transformers needs.
    """
    first = paths[0]
    if model is not None:
        is_whole = model.weights or not first.is_file()
        return open_model(model if is_whole else headers(GgufModel(first, model.path)))
    for path in paths:
        if not path.exists():
            raise CheckpointError(f"{path}: no such file or folder")
        if path.is_dir() and _layout(path) is None:
            return open_checkpoint(path)
    if (first.parent / "config.json").is_file():
        return open_model(headers(GgufModel(first)))
    raise CheckpointError(
        f"{first}: the unquantized folder of the model is needed to run it; name it with --model "
        "(config.json, headers and tokenizer are read), or use --engine llama.cpp"
    )


def open_source(path: Path, checkpoint: Checkpoint, exact: bool = False) -> Source:
    """A folder or a GGUF file as weights of `checkpoint`; `exact`: nobody asks what becomes of inputs.

    Raises CheckpointError for what is neither, and VerifyError when it is another model.
    """
    if path.is_dir():
        layout = _layout(path)
        if layout is not None and (path / RECORD).is_file():  # ours, which somebody else's decoder reads
            return _quantized(path, layout, checkpoint, exact)
        return _folder(path, layout or "checkpoint", checkpoint, exact)
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
    first, tokens = headers[0], headers[0].array(TOKENS)
    for header in headers[1:]:
        same_metadata(header.path, that_runs(header.metadata), first.path, that_runs(first.metadata))
        same_texts(header.path, header.array(TOKENS), first.path, tokens)
    return tuple(
        Source(one.path, "GGUF", None, one.file_bytes, {each.name: each.type for each in one.tensors})
        for one in headers
    )


def _layout(path: Path) -> str | None:
    """Which of PACKED a folder is; None for a checkpoint, whatever numbers it was released with."""
    try:
        quantization = read_json(path / "config.json").get("quantization_config")
    except CheckpointError as error:
        raise CheckpointError(
            f"{path}: neither a GGUF file nor a model folder with a config.json ({error})"
        ) from None
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    return method if method in PACKED else None


def _folder(path: Path, kind: str, checkpoint: Checkpoint, exact: bool) -> Source:
    """A folder of any tool, its weights decoded as a conversion of it would: every scale and zero point has
    its place, or the folder is refused."""
    other = checkpoint if path == checkpoint.path else open_checkpoint(path)
    same_model(other, checkpoint)
    theirs = {weight.name: weight for weight in other.weights}
    types = {name: weight.origin.dtype for name, weight in theirs.items()}
    declared = read_config(quantization_of(path, other.raw))
    inputs = (
        folder_inputs(path, declared, theirs.values(), stored_codes)
        if declared.method and not exact
        else None
    )
    provider: Provider = lambda weight: load(theirs[weight.name].like(weight))  # noqa: E731
    return Source(path, kind, provider, other.source_bytes, types, inputs, cache_of(declared))


def same_model(other: Checkpoint, checkpoint: Checkpoint) -> None:
    """VerifyError when a folder is no version of that model: other sizes, tokens or weights."""
    path = other.path
    same_values(path, identity(other), checkpoint.path, identity(checkpoint), SAME_CONFIG)
    _same_tokens(path, checkpoint)
    shapes = {weight.name: weight.shape for weight in other.weights}
    for weight in checkpoint.weights:
        _same_shape(path, weight, shapes.get(weight.name))
    if extra := sorted(shapes.keys() - {weight.name for weight in checkpoint.weights}):
        raise VerifyError(f"{path}: {extra[0]} is not in {checkpoint.path}; is one tied and the other not?")


def _quantized(path: Path, layout: str, checkpoint: Checkpoint, exact: bool) -> Source:
    """A folder of packed integers, decoded by the package of its layout."""
    # the decoder is an optional package
    from moequant.containers.folders import awq, compressed_tensors, gptq

    openers = dict(zip(PACKED, (each.open_folder for each in (compressed_tensors, gptq, awq)), strict=True))
    found = openers[layout](path)
    mine = identity(checkpoint)
    same_values(path, identity_of(found.family, found.config), checkpoint.path, mine, SAME_CONFIG)
    _same_tokens(path, checkpoint)
    size = sum((path / name).stat().st_size for name in set(found.files.values()))
    types = {
        weight.name: layout if found.is_quantized(weight) else weight.origin.dtype
        for weight in checkpoint.weights
    }
    inputs = None
    if not exact:
        inputs = folder_inputs(path, read_config(found.quantization), checkpoint.weights, found.codes)
    return Source(path, layout, found.load, size, types, inputs)


def _gguf(path: Path, checkpoint: Checkpoint) -> Source:
    file, exported = GgufFile(path), export(checkpoint)
    check_same(file.header, exported)
    by_name = {tensor.name: tensor.type for tensor in file.header.tensors}
    types = {
        each.name: by_name[exported.names[exported.parts[each.name][-1][0]]] for each in checkpoint.weights
    }
    return Source(path, "GGUF", GgufWeights(path, exported, file).load, file.header.file_bytes, types)


def _same_shape(path: Path, weight: Weight, shape: tuple[int, ...] | None) -> None:
    if shape is None:
        raise VerifyError(f"{path}: tensor {weight.name} is missing")
    if shape != weight.shape:
        raise VerifyError(f"{path}: {weight.name} is {list(shape)}, expected {list(weight.shape)}")


def _same_tokens(path: Path, checkpoint: Checkpoint) -> None:
    """The tokenizers of two folders, when the other one has any."""
    if path != checkpoint.path and (path / "tokenizer.json").is_file():
        same_texts(path, vocabulary(path), checkpoint.path, vocabulary(checkpoint.path))
