"""A Hugging Face model folder, read lazily: headers first, then one weight at a time.

The one place where stored tensors become model weights: the family's slots say how.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from moequant import families
from moequant.checkpoint.codecs import as_shipped, recognise
from moequant.checkpoint.headers import read_headers, read_json
from moequant.errors import CheckpointError, FamilyError
from moequant.families import Config, Family, Get, Slot
from moequant.families.config import check_experts, make_config
from moequant.values import ModelShape, Origin, Place, Role, Stack, Stored, Weight
from moequant.values.ops import shape_after

FLOATS = ("BF16", "F16", "F32")
"""Types that a stored tensor may decode to."""

MODELOPT = "hf_quant_config.json"
"""Where ModelOpt says how it quantized."""

MOST = 1 << 20
"""More layers or experts than this are a slip of the config, and would be looped over."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened model: only headers are in memory.

    `raw` is config.json as it is, `config` what its class in transformers makes of it. `weights` are those of
    the model in the order in which they compute, the head last. `skipped` counts the stored tensors that
    are left out on purpose, by the reason.
    """

    path: Path
    raw: Mapping[str, Any]
    config: Config
    family: Family
    shape: ModelShape
    weights: tuple[Weight, ...]
    skipped: Mapping[str, int] = field(default_factory=dict)

    @property
    def repository(self) -> str:
        """What the Hub calls the model, ORG/NAME, if it lies in Hugging Face's cache; else the folder's
        name."""
        folder = self.path.resolve()
        if folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--"):
            return folder.parents[1].name.removeprefix("models--").replace("--", "/")
        return folder.name

    @property
    def name(self) -> str:
        """What people call the model: the repository's name without its owner."""
        return self.repository.rpartition("/")[2]

    @property
    def source_bytes(self) -> int:
        """Bytes of weight data in the checkpoint's own precision."""
        stored = {each.name: each for weight in self.weights for each in weight.origin.stored}
        return sum(each.bytes for each in stored.values())

    @property
    def tied(self) -> bool:
        """Whether the embedding is the head as well."""
        return self.shape.tied

    @property
    def n_experts(self) -> int:
        """Experts per layer, 0 for a dense model."""
        return self.shape.experts

    @property
    def n_layers(self) -> int:
        """Decoder layers."""
        return self.shape.layers

    def with_weights(self, weights: tuple[Weight, ...]) -> Checkpoint:
        """The same model cut into other weights: as a container refines them."""
        return replace(self, weights=weights)


def open_checkpoint(path: Path) -> Checkpoint:
    """Read config and headers of a model folder.

    Raises CheckpointError for a missing, truncated or unreadable file and FamilyError for
    an architecture, a config key or a tensor that no family describes.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: no such folder; give a Hugging Face model folder")
    if not path.is_dir() or not (path / "config.json").is_file():
        raise CheckpointError(
            f"{path}: not a Hugging Face model folder (config.json and *.safetensors expected)"
        )
    raw = read_json(path / "config.json")
    family = families.find(raw)
    quantization = _quantization(path, raw)
    found = recognise(read_headers(path), quantization)
    stored = {renamed(family, name): each for name, each in found.items()}
    tied = _tied(path, bool(make_config(family, raw).tie_word_embeddings), stored)
    config = make_config(family, raw, tied)
    shape = _shape(family, config)
    weights, skipped = _assemble(family, config, shape, stored)
    embedding = next(weight for weight in weights if weight.role is Role.EMBEDDING)
    if embedding.shape != (shape.vocab, shape.hidden):
        raise CheckpointError(
            f"{path}: the embedding is {list(embedding.shape)}, config.json says "
            f"{[shape.vocab, shape.hidden]} (vocab_size, hidden_size)"
        )
    return Checkpoint(path, raw, config, family, shape, weights, skipped)


def _quantization(path: Path, raw: Mapping[str, Any]) -> dict[str, Any] | None:
    """How the checkpoint says that it is quantized: in config.json, or in ModelOpt's own file."""
    inner = raw.get("text_config")
    nested = inner.get("quantization_config") if isinstance(inner, dict) else None
    found = raw.get("quantization_config") or nested
    if found is None and (path / MODELOPT).is_file():
        found = read_json(path / MODELOPT)
    if found is not None and not isinstance(found, dict):
        raise CheckpointError(
            f"{path / 'config.json'}: quantization_config is {found!r}; an object was expected"
        )
    return found


def renamed(family: Family, name: str) -> str:
    """A stored name as the family's slots spell it."""
    for old, new in family.renamed:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _tied(path: Path, wanted: bool, stored: dict[str, Stored]) -> bool:
    """Whether the model's head is its embedding, as transformers decides it: not where both are stored and
    differ. The second of two equal ones is dropped."""
    embedding, head = (stored.get(name) for name in ("model.embed_tokens.weight", "lm_head.weight"))
    if not wanted and head is None:
        raise CheckpointError(f"{path}: lm_head.weight is missing and tie_word_embeddings is not set")
    if not wanted or head is None or embedding is None:
        return wanted
    if _same(embedding, head):
        del stored["lm_head.weight"]
        return True
    return False


def _same(one: Stored, two: Stored, rows: int = 1024) -> bool:
    """Whether two matrices hold the same numbers."""
    if one.shape != two.shape or len(one.shape) != 2:
        return False
    parts = (range(at, min(at + rows, one.shape[0])) for at in range(0, one.shape[0], rows))
    return all(torch.equal(one.read(rows=part), two.read(rows=part)) for part in parts)


def _shape(family: Family, config: Config) -> ModelShape:
    """The typed shape, its numbers within reason. FamilyError names a key that is none."""
    try:
        shape = family.shape(config)
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise FamilyError(
            f"{family.name}: config.json does not say how large the model is ({error})"
        ) from None
    sizes = {
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.context,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
    }
    for key, size in sizes.items():
        if size < 1:
            raise FamilyError(f"{family.name}: config key {key} = {size}: a size above 0 was expected")
    for key, size in (("num_hidden_layers", shape.layers), ("number of experts", shape.experts)):
        if size > MOST:
            raise FamilyError(f"{family.name}: config key {key} = {size}: more than any model has")
    for key in ("rms_norm_eps", "norm_eps", "layer_norm_eps", "layer_norm_epsilon"):
        epsilon = getattr(config, key, None)
        if epsilon is not None and not 0 <= epsilon < 1:
            raise FamilyError(
                f"{family.name}: config key {key} = {epsilon}: a number from 0 to 1 was expected"
            )
    check_experts(family, shape.experts, shape.experts_used)
    return shape


def _assemble(
    family: Family, config: Config, shape: ModelShape, stored: Mapping[str, Stored]
) -> tuple[tuple[Weight, ...], dict[str, int]]:
    """Every slot filled, every stored tensor claimed or skipped on purpose."""
    claimed: set[str] = set()
    found: list[Weight] = []
    numbered = [(None, family.ends(config)), *((n, family.layer(config, n)) for n in range(shape.layers))]
    for number, slots in numbered:
        for slot in slots:
            weight = _weight(slot, number, shape, stored)
            if weight is not None:
                claimed |= {renamed(family, each.name) for each in weight.origin.stored}
                found.append(weight)
    skipped = _left_out(family, config, (name for name in stored if name not in claimed), stored)
    # The head comes last: what it is fed is known when everything before it has been rounded.
    return tuple(sorted(found, key=lambda weight: weight.role is Role.OUTPUT)), skipped


def _left_out(
    family: Family, config: Config, names: Iterable[str], stored: Mapping[str, Stored]
) -> dict[str, int]:
    """Tensors that no slot names, counted by the reason. FamilyError for one without any."""
    reasons = [(re.compile(pattern), reason) for pattern, reason in family.skipped(config).items()]
    skipped: dict[str, int] = {}
    for name in names:
        reason = next((reason for pattern, reason in reasons if pattern.fullmatch(name)), None)
        if reason is None:
            layer = re.search(r"layers\.(\d+)\.", name)
            layers = config.num_hidden_layers
            if layer is not None and int(layer[1]) >= layers:
                raise CheckpointError(
                    f"tensors of layer {layer[1]} exist ({name}), but config.json says {layers} layers"
                )
            raise FamilyError(
                f"{family.name}: tensor {name} {list(stored[name].shape)} is unknown; nothing is dropped "
                "silently"
            )
        skipped[reason] = skipped.get(reason, 0) + 1
    return skipped


def _weight(slot: Slot, layer: int | None, shape: ModelShape, stored: Mapping[str, Stored]) -> Weight | None:
    """What the checkpoint has for a slot; None for an optional one that is absent."""
    where = slot.role.value if layer is None else f"layer {layer} {slot.role.value}"
    there = {way: names for way in slot.ways if (names := _there(way, shape.experts, stored))}
    # Where none has the rows that it should, the first says what is wrong.
    fit = [way for way, names in there.items() if way.rows in (None, *stored[names[0]].shape[-2:-1])]
    ways = {way: there[way] for way in fit or list(there)[:1]}
    if not ways:
        if slot.optional:
            return None
        name = slot.ways[0].name
        raise CheckpointError(f"{where} is missing ({name}); is the download complete?")
    if len(ways) > 1:
        one, two = (names[0] for names in list(ways.values())[:2])
        raise CheckpointError(f"{where}: stored twice, as {one} and as {two}")
    ((way, names),) = ways.items()
    tensors = tuple(stored[name] for name in names)
    _check_tensors(where, way, tensors, shape.experts)
    try:
        whole = _shape_of(slot, way, tensors, shape.experts)
    except ValueError as error:
        raise CheckpointError(f"{where}: {names[0]} is {list(tensors[0].shape)}; {error} do not go") from None
    return Weight(
        name=slot.name,
        role=slot.role,
        layer=layer,
        shape=whole,
        stack=slot.stack,
        origin=Origin(tensors, way.ops, _holds(tensors)),
        place=Place(slot.param, slot.ops),
        site=slot.site,
        names=_release_names(slot, shape.experts),
        adds=slot.adds,
    )


def _holds(tensors: tuple[Stored, ...]) -> str | None:
    """The ggml type that holds exactly what all of the tensors do."""
    kinds = {as_shipped(each) for each in tensors}
    return kinds.pop() if len(kinds) == 1 else None


def _there(way: Get, experts: int, stored: Mapping[str, Stored]) -> tuple[str, ...]:
    """The stored tensors of a way that are there, in the order of the experts."""
    if "{e}" not in way.name:
        return (way.name,) if way.name in stored else ()
    names = (way.name.replace("{e}", str(expert)) for expert in range(experts))
    return tuple(name for name in names if name in stored)


def _check_tensors(where: str, way: Get, tensors: tuple[Stored, ...], experts: int) -> None:
    """CheckpointError for experts that are missing or unlike each other, and for types that are no floats."""
    for each in tensors:
        if each.dtype not in FLOATS:
            raise CheckpointError(
                f"tensor {each.name} is stored as {each.dtype}; expected "
                f"{', '.join(FLOATS)} (convert the checkpoint first)"
            )
    if "{e}" not in way.name:
        return
    if len(tensors) < experts:
        there = {each.name for each in tensors}
        gone = [e for e in range(experts) if way.name.replace("{e}", str(e)) not in there]
        shown = ", ".join(map(str, gone[:10])) + (", …" if len(gone) > 10 else "")
        raise CheckpointError(f"{where}: experts [{shown}] of {experts} missing; is the download complete?")
    if len({(each.shape, each.dtype) for each in tensors}) != 1:
        odd = next(
            each for each in tensors if (each.shape, each.dtype) != (tensors[0].shape, tensors[0].dtype)
        )
        raise CheckpointError(f"{where}: {odd.name} has another shape or dtype than expert 0; experts differ")


def _shape_of(slot: Slot, way: Get, tensors: tuple[Stored, ...], experts: int) -> tuple[int, ...]:
    """The weight's shape; ValueError, with what does not go, when the stored ones are not what the slot
    says."""
    shape = tensors[0].shape
    if slot.stack is not Stack.EXPERTS:
        return shape_after(way.ops, shape)
    if "{e}" in way.name:
        return (experts, *shape_after(way.ops, shape))
    if len(shape) == 2:
        return shape_after(way.ops, shape)
    if len(shape) != 3 or shape[0] != experts:
        raise ValueError(f"{experts} experts of config.json")
    return (experts, *shape_after(way.ops, shape[1:]))


def _release_names(slot: Slot, experts: int) -> tuple[str, ...]:
    """What checkpoints with a tensor of its own for every expert call the matrices of a slot."""
    name = slot.ways[0].name
    return tuple(name.replace("{e}", str(e)) for e in range(experts)) if "{e}" in name else (name,)
