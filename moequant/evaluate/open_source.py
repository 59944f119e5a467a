"""Whatever can be compared, opened as weights of the model that it claims to be.

Decoders are other people's: gguf-py's for GGUF, the compressed-tensors package's for its folders.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moequant.checkpoint import Checkpoint, Folder, load, open_checkpoint
from moequant.checkpoint.headers import read_json
from moequant.containers.gguf.export import export
from moequant.containers.gguf.header import plain
from moequant.containers.gguf.read import GgufFile, read_header
from moequant.containers.gguf.tokenizer.spec import read_tokenizer
from moequant.containers.gguf.weights import GgufWeights
from moequant.errors import CheckpointError, VerifyError
from moequant.escape import shown
from moequant.evaluate.activations import of_scheme
from moequant.files import RECORD
from moequant.forward.model import Provider
from moequant.statistics.store import identity, identity_of
from moequant.values import Weight

if TYPE_CHECKING:
    from moequant.containers.folders.read import FolderWeights

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

PACKED = ("compressed-tensors", "gptq")
"""Layouts of folders whose own packages decode them: versions of a model, not the model."""

TOKENS = "tokenizer.ggml.tokens"
"""The key of the vocabulary's texts."""

FOREIGN_TOKENS = 0.01
"""Tools spell a few special tokens differently; more than this share of others is another vocabulary."""


@dataclass(frozen=True, slots=True)
class Source:
    """A version of a model: where and what it is, its bytes, the type of every weight.

    `provider` loads its weights; None when another engine runs it. `inputs` are what `activations.rounding`
    calls what happens to the inputs of every weight, None where that follows from types.
    """

    path: Path
    kind: str
    provider: Provider | None
    bytes: int
    types: Mapping[str, str]
    inputs: Mapping[str, str] | None = None

    @property
    def name(self) -> str:
        """What tables call it."""
        return shown(self.path)


def open_model(paths: Sequence[Path], model: Folder | None) -> Checkpoint:
    """How the compared models compute: `model`, or the first path that is an unquantized folder.

    CheckpointError when there is none: GGUF files alone do not say what transformers needs.
    """
    if model is not None:
        return open_checkpoint(model)
    for path in paths:
        if not path.exists():
            raise CheckpointError(f"{path}: no such file or folder")
        if path.is_dir() and _layout(path) is None:
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
        layout = _layout(path)
        if layout is not None and (path / RECORD).is_file():  # ours, which somebody else's decoder reads
            return _quantized(path, layout, checkpoint)
        return _folder(path, layout or "checkpoint", checkpoint)
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
    first, vocabulary = headers[0], headers[0].array(TOKENS)
    for header in headers[1:]:
        _same_metadata(header.path, _that_runs(header.metadata), first.path, _that_runs(first.metadata))
        _same_texts(header.path, header.array(TOKENS), first.path, vocabulary)
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


def _folder(path: Path, kind: str, checkpoint: Checkpoint) -> Source:
    """A folder of any tool, its weights decoded as a conversion of it would: every scale and zero point has
    its place, or the folder is refused."""
    other = checkpoint if path == checkpoint.path else open_checkpoint(path)
    _same_values(path, identity(other), checkpoint.path, identity(checkpoint), SAME_CONFIG)
    _same_tokens(path, checkpoint)
    theirs = {weight.name: weight for weight in other.weights}
    for weight in checkpoint.weights:
        _same_shape(path, weight, theirs[weight.name].shape if weight.name in theirs else None)
    if extra := sorted(theirs.keys() - {weight.name for weight in checkpoint.weights}):
        raise VerifyError(f"{path}: {extra[0]} is not in {checkpoint.path}; is one tied and the other not?")
    types = {name: weight.origin.dtype for name, weight in theirs.items()}
    inputs = (
        None if kind == "checkpoint" else _inputs(other.raw.get("quantization_config"), checkpoint, other)
    )
    provider: Provider = lambda weight: load(theirs[weight.name])  # noqa: E731
    return Source(path, kind, provider, other.source_bytes, types, inputs)


def _quantized(path: Path, layout: str, checkpoint: Checkpoint) -> Source:
    """A folder of packed integers, decoded by the package of its layout."""
    # the decoder is an optional package
    from moequant.containers.folders import compressed_tensors, gptq

    openers = dict(zip(PACKED, (compressed_tensors.open_folder, gptq.open_folder), strict=True))
    found = openers[layout](path)
    mine = identity(checkpoint)
    _same_values(path, identity_of(found.family, found.config), checkpoint.path, mine, SAME_CONFIG)
    _same_tokens(path, checkpoint)
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    types = {
        weight.name: layout if found.is_quantized(weight) else weight.origin.dtype
        for weight in checkpoint.weights
    }
    return Source(path, layout, found.load, size, types, _inputs(found.quantization, checkpoint, found))


def _inputs(
    config: Mapping[str, Any] | None, checkpoint: Checkpoint, version: FolderWeights | Checkpoint
) -> dict[str, str]:
    """By weight, what its scheme makes of its inputs."""
    from moequant.containers.folders.compressed_tensors import group_of

    def of(weight: Weight) -> str:
        if not config or config.get("quant_method") != "compressed-tensors" or len(weight.shape) < 2:
            return "F32"
        if not isinstance(version, Checkpoint) and not version.is_quantized(weight):
            return "F32"
        module = weight.names[0].removesuffix(".weight") if weight.names else ""
        if module in config.get("ignore", ()) or weight.role.keeps_precision or not weight.site:
            return "F32"
        try:
            return of_scheme(group_of(config, module).get("input_activations"))
        except VerifyError:
            return "F32"

    return {weight.name: of(weight) for weight in checkpoint.weights}


def _gguf(path: Path, checkpoint: Checkpoint) -> Source:
    file, exported = GgufFile(path), export(checkpoint)
    header, names = file.header, exported.names
    shapes = {tensor.name: tensor.shape for tensor in header.tensors}
    vocabulary = shapes.get(names["embedding"], (None,))[0]
    mine = {**exported.metadata, "general.architecture": exported.arch, "vocab_size": checkpoint.shape.vocab}
    theirs_too = {**header.metadata, "vocab_size": vocabulary}
    _same_metadata(path, _that_runs(theirs_too), checkpoint.path, _that_runs(mine))
    _same_vocabulary(path, header.array(TOKENS), checkpoint)
    for weight in exported.weights:
        theirs = names[weight.name]
        if theirs not in shapes and weight.layer is not None and not weight.runs:
            continue
        if theirs not in shapes:
            raise VerifyError(f"{path}: tensor {theirs} is missing")
        if shapes[theirs] != exported.shapes[weight.name]:
            expected = list(exported.shapes[weight.name])
            raise VerifyError(f"{path}: {theirs} is {list(shapes[theirs])}, expected {expected}")
    running = {each.name for each in header.tensors if (each.layer or 0) < checkpoint.n_layers}
    if extra := sorted(running - set(names.values())):
        raise VerifyError(f"{path}: tensor {extra[0]} is unknown to {checkpoint.path}; is it the same model?")
    by_name = {tensor.name: tensor.type for tensor in header.tensors}
    types = {each.name: by_name[names[exported.parts[each.name][-1][0]]] for each in checkpoint.weights}
    return Source(path, "GGUF", GgufWeights(path, exported, file).load, header.file_bytes, types)


def _that_runs(metadata: Mapping[str, Any]) -> Mapping[str, Any]:
    """The keys as they are without layers that predict the token after the next: tools may leave those
    out."""
    arch = metadata.get("general.architecture")
    more, layers = (metadata.get(f"{arch}.{key}") for key in ("nextn_predict_layers", "block_count"))
    if not isinstance(more, int) or not isinstance(layers, int) or not 0 < more < layers:
        return metadata
    lists = {
        key: value[: layers - more]
        for key, value in metadata.items()
        if isinstance(value, list | tuple) and len(value) == layers
    }
    return {**metadata, **lists, f"{arch}.block_count": layers - more}


def _same_metadata(path: Path, theirs: Mapping[str, Any], base: Path, mine: Mapping[str, Any]) -> None:
    """VerifyError naming the first of the keys in SAME, or architecture or vocabulary, that differs."""
    arch = mine["general.architecture"]
    keys = ("general.architecture", "vocab_size", *(f"{arch}.{name}" for name in SAME))
    _same_values(path, theirs, base, mine, keys)


def _same_values(
    path: Path, theirs: Mapping[str, Any], base: Path, mine: Mapping[str, Any], keys: Sequence[str]
) -> None:
    """VerifyError naming the first of `keys` that both have and that differs."""
    for key in keys:
        one, two = mine.get(key), theirs.get(key)
        if one is not None and two is not None and not _equal(one, two):
            raise VerifyError(f"{path}: another model than {base}: {key} is {plain(str(two))}, not {one}")


def _equal(one: Any, two: Any) -> bool:
    numbers = isinstance(one, int | float) and isinstance(two, int | float)
    if numbers and (isinstance(one, float) or isinstance(two, float)):
        return math.isclose(float(one), float(two), rel_tol=1e-5)
    if isinstance(one, list | tuple) and isinstance(two, list | tuple):
        return len(one) == len(two) and all(map(_equal, one, two))
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
            f"differ, token {first} is {theirs[first]!r:.80}, not {mine[first]!r}"
        )
