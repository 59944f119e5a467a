"""Whether what lies in another file is a version of the same model: sizes, vocabulary, tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moequant.checkpoint import Checkpoint
from moequant.containers.gguf.export import Exported
from moequant.containers.gguf.header import Header, plain
from moequant.containers.gguf.tokenizer.spec import read_tokenizer
from moequant.errors import VerifyError

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

TOKENS = "tokenizer.ggml.tokens"
"""The key of the vocabulary's texts."""

FOREIGN_TOKENS = 0.01
"""Tools spell a few special tokens differently; more than this share of others is another vocabulary."""


def check_same(header: Header, exported: Exported) -> None:
    """VerifyError when a GGUF file is of another model than `exported`, or lacks one of its tensors."""
    path, names, checkpoint = header.path, exported.names, exported.checkpoint
    shapes = {tensor.name: tensor.shape for tensor in header.tensors}
    vocabulary = shapes.get(names["embedding"], (None,))[0]
    mine = {**_full(exported), "vocab_size": checkpoint.shape.vocab}
    theirs = {**header.metadata, "vocab_size": vocabulary}
    same_metadata(path, that_runs(theirs), checkpoint.path, that_runs(mine))
    same_vocabulary(path, header.array(TOKENS), checkpoint)
    for weight in exported.weights:
        name = names[weight.name]
        if name not in shapes and weight.layer is not None and not weight.runs:
            continue
        if name not in shapes:
            raise VerifyError(f"{path}: tensor {name} is missing")
        if shapes[name] != exported.shapes[weight.name]:
            expected = list(exported.shapes[weight.name])
            raise VerifyError(f"{path}: {name} is {list(shapes[name])}, expected {expected}")
    running = {each.name for each in header.tensors if (each.layer or 0) < checkpoint.n_layers}
    if extra := sorted(running - set(names.values())):
        raise VerifyError(f"{path}: tensor {extra[0]} is unknown to {checkpoint.path}; is it the same model?")


def _full(exported: Exported) -> dict[str, Any]:
    return {**exported.metadata, "general.architecture": exported.arch}


def differences(header: Header, exported: Exported) -> tuple[str, ...]:
    """A sentence where a GGUF file says otherwise than `exported`, in keys that are not in SAME."""
    found = differing(header, exported)
    if not found:
        return ()
    said = ", ".join(f"{key} = {theirs}" for key, theirs, _ in found)
    return (f"the file says {said}, and config.json something else, which counts",)


def differing(header: Header, exported: Exported) -> tuple[tuple[str, str, str], ...]:
    """(key, what the file says, what `exported` says) of the same."""
    mine, theirs = that_runs(_full(exported)), that_runs(header.metadata)
    keys = [key for key in mine if key in theirs and not equal(mine[key], theirs[key])]
    scaling = f"{exported.arch}.rope.scaling."
    keys += [key for key in theirs if key.startswith(scaling) and key not in mine]
    return tuple((key, _short(theirs.get(key)), _short(mine.get(key))) for key in keys)


def _short(value: Any) -> str:
    return plain(str(value))[:80]


def that_runs(metadata: Mapping[str, Any]) -> Mapping[str, Any]:
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


def same_metadata(path: Path, theirs: Mapping[str, Any], base: Path, mine: Mapping[str, Any]) -> None:
    """VerifyError naming the first of the keys in SAME, or architecture or vocabulary, that differs."""
    arch = mine["general.architecture"]
    keys = ("general.architecture", "vocab_size", *(f"{arch}.{name}" for name in SAME))
    same_values(path, theirs, base, mine, keys)


def same_values(
    path: Path, theirs: Mapping[str, Any], base: Path, mine: Mapping[str, Any], keys: Sequence[str]
) -> None:
    """VerifyError naming the first of `keys` that both have and that differs."""
    for key in keys:
        one, two = mine.get(key), theirs.get(key)
        if one is not None and two is not None and not equal(one, two):
            raise VerifyError(f"{path}: another model than {base}: {key} is {plain(str(two))}, not {one}")


def equal(one: Any, two: Any) -> bool:
    """Whether two values of keys mean the same: floats to f32's precision, lists and tuples alike."""
    numbers = isinstance(one, int | float) and isinstance(two, int | float)
    if numbers and (isinstance(one, float) or isinstance(two, float)):
        return math.isclose(float(one), float(two), rel_tol=1e-5)
    if isinstance(one, list | tuple) and isinstance(two, list | tuple):
        return len(one) == len(two) and all(map(equal, one, two))
    return bool(one == two)


def same_vocabulary(path: Path, theirs: Sequence[str], checkpoint: Checkpoint) -> None:
    """VerifyError when the checkpoint's tokenizer has other texts."""
    same_texts(path, theirs, checkpoint.path, read_tokenizer(checkpoint.path).tokens)


def same_texts(path: Path, theirs: Sequence[str], base: Path, mine: Sequence[str]) -> None:
    """VerifyError when the same ids mean other texts."""
    pairs = list(zip(mine, theirs, strict=False))
    foreign = [number for number, (one, two) in enumerate(pairs) if one != two]
    if len(foreign) > FOREIGN_TOKENS * len(pairs):
        first = foreign[0]
        raise VerifyError(
            f"{path}: another vocabulary than {base}: {len(foreign)} of {len(pairs)} tokens "
            f"differ, token {first} is {theirs[first]!r:.80}, not {mine[first]!r}"
        )
