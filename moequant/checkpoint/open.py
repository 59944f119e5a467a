"""A Hugging Face model folder, read lazily: headers first, then one weight at a time.

The one place where stored tensors become model weights: the family's slots say how.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from moequant import families
from moequant.checkpoint.codecs import WHOLE, declared, recognise
from moequant.checkpoint.codecs.base import read_part
from moequant.checkpoint.folder import Folder, folder_of
from moequant.checkpoint.headers import read_headers
from moequant.checkpoint.predictions import Predictions
from moequant.checkpoint.slots import weight_of
from moequant.errors import CheckpointError, FamilyError, few, foreign
from moequant.escape import of_cache
from moequant.families import Config, Family, Slot
from moequant.families.base import PREDICTION
from moequant.families.config import SHARED, check_experts, check_groups, make_config, no_shared
from moequant.files.read import read_json
from moequant.values import ModelShape, Place, Role, Stored, Weight

DECLARED = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
"""Where ModelOpt, AutoGPTQ and AutoAWQ say how they quantized; of the last two, old versions nowhere else."""

FRONT = "model", "language_model", "backbone", "transformer"
"""What names of the text model begin with."""

EMPTY = "without any number"
"""Why a tensor is skipped that has a dimension of 0."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened model: only headers are in memory.

    `raw` is config.json as it is, `config` what its class in transformers makes of it. `weights` are those of
    the model in the order in which they compute, the head last. `predictions` are layers behind the last,
    which transformers does not run. `skipped` counts the stored tensors that are left out on purpose, by the
    reason; `unread` are those of them that lie beside the text model, in towers. `constants` are whole
    numbers that the model makes of its config as well. `gguf` is the file that has the weights where no
    safetensors do; `notes` are what a person should know of it.
    """

    path: Path
    raw: Mapping[str, Any]
    config: Config
    family: Family
    shape: ModelShape
    weights: tuple[Weight, ...]
    skipped: Mapping[str, int] = field(default_factory=dict)
    predictions: Predictions = field(default_factory=Predictions)
    constants: tuple[Stored, ...] = ()
    unread: Mapping[str, tuple[Stored, ...]] = field(default_factory=dict)
    gguf: Path | None = None
    notes: tuple[str, ...] = ()

    @property
    def source(self) -> Path:
        """What the weights were read from."""
        return self.path if self.gguf is None else self.gguf

    @property
    def repository(self) -> str:
        """See `repository`."""
        return repository(self.path)

    @property
    def hub_name(self) -> str | None:
        """ORG/NAME, as the Hub calls the model; None of a folder, which does not tell it."""
        cached = of_cache(self.path)
        return cached[0] if cached else None

    @property
    def revision(self) -> str | None:
        """The commit of a model of the Hub, None of a folder that does not tell, and of a file."""
        cached = None if self.gguf else of_cache(self.path)
        return cached[1] if cached else None

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
    def encodes(self) -> bool:
        """Whether the model has an encoder beside its decoder: of servers only transformers runs it."""
        return bool(self.config.is_encoder_decoder)

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

    def untied(self) -> Checkpoint:
        """The same model with a head of its own, which holds the numbers of its embedding."""
        if not self.tied:
            return self
        config = make_config(self.family, self.raw, False)
        slot = next(slot for slot in _ends(self.family, config) if slot.role is Role.OUTPUT)
        embedding = next(weight for weight in self.weights if weight.role is Role.EMBEDDING)
        head = replace(
            embedding, name=slot.name, role=slot.role, place=Place(slot.param, slot.ops), site=slot.site
        )
        others = (replace(each, site=None) if each is embedding else each for each in self.weights)
        weights = head_last((*others, head))
        return replace(self, config=config, shape=shape_of(self.family, config), weights=weights)

    def without_predictions(self) -> Checkpoint:
        """The same model without the layers behind the last: they are left out."""
        if not self.predictions.stored:
            return self
        skipped = {**self.skipped, PREDICTION: len(self.predictions.stored)}
        return replace(self, skipped=skipped, predictions=Predictions())


def repository(path: Path) -> str:
    """What the Hub calls the model of a folder, ORG/NAME, if it lies in Hugging Face's cache; else the
    folder's name."""
    cached = of_cache(path)
    return cached[0] if cached else path.resolve().name


def around(name: str) -> str:
    """What a tensor or module lies in: "layers" of the text model, or a tower."""
    return next((part for part in name.split(".") if part not in FRONT), name)


def open_checkpoint(model: Path | Folder) -> Checkpoint:
    """Read config and headers of a model folder.

    Raises CheckpointError for a missing, truncated or unreadable file and FamilyError for
    an architecture, a config key or a tensor that no family describes.
    """
    folder = folder_of(model)
    path = folder.path
    raw, family = read_config(path)
    quantization = quantization_of(path, raw)
    found = recognise(read_headers(folder), quantization)
    stored = {renamed(family, name): each for name, each in found.items()}
    tied = _tied(path, family, make_config(family, raw), stored)
    config = make_config(family, raw, tied)
    shape = shape_of(family, config)
    constants = _constants(family, config, stored)
    rest = {name: each for name, each in stored.items() if name not in constants}
    weights, skipped = _assemble(family, config, shape, rest)
    drafts = {name: stored[name] for name in skipped.pop(PREDICTION, ())}
    with foreign(FamilyError, f"{family.name}: config.json does not say what layers predict further tokens"):
        predictions = Predictions.of(family, config, shape, weights, drafts)
    embedding = next(weight for weight in weights if weight.role is Role.EMBEDDING)
    if embedding.shape != (shape.vocab, shape.hidden):
        raise CheckpointError(
            f"{path}: the embedding is {list(embedding.shape)}, config.json says "
            f"{[shape.vocab, shape.hidden]} (vocab_size, hidden_size)"
        )
    counted = {reason: len(names) for reason, names in skipped.items()}
    unread = {
        reason: tuple(stored[name] for name in names if around(name) != "layers")
        for reason, names in skipped.items()
        if reason != EMPTY
    }
    notes = [f"not read, as in transformers: {few(folder.beside, 5)}"] if folder.beside else []
    held = tuple(constants.values())
    return Checkpoint(
        path, raw, config, family, shape, weights, counted, predictions, held, unread, notes=tuple(notes)
    )


def read_config(path: Path) -> tuple[dict[str, Any], Family]:
    """config.json of a folder, and the family of its model. CheckpointError and FamilyError as above."""
    raw = read_json(path / "config.json")
    return raw, families.find(raw)


def quantization_of(path: Path, raw: Mapping[str, Any]) -> dict[str, Any] | None:
    """How the checkpoint says that it is quantized: in config.json, or in its tool's own file."""
    inner = raw.get("text_config")
    nested = inner.get("quantization_config") if isinstance(inner, dict) else None
    found = raw.get("quantization_config") or nested
    if found is None and (own := [path / name for name in DECLARED if (path / name).is_file()]):
        found = read_json(own[0])
    if found is not None and not isinstance(found, dict):
        raise CheckpointError(
            f"{path / 'config.json'}: quantization_config is {found!r}; an object was expected"
        )
    return found


def method_of(path: Path, raw: Mapping[str, Any]) -> str | None:
    """What a folder's quantization is called, None when it has none."""
    try:
        found = quantization_of(path, raw)
    except CheckpointError:
        return "unknown"
    try:
        with foreign(CheckpointError, "quantization_config cannot be read"):
            return declared.read_config(found).method or None
    except CheckpointError:  # a method that is not read has a name too
        return str(found.get("quant_method", "unknown")) if found else None


def renamed(family: Family, name: str) -> str:
    """A stored name as the family's slots spell it."""
    for old, new in family.renamed:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _tied(path: Path, family: Family, config: Config, stored: dict[str, Stored]) -> bool:
    """Whether the model's head is its embedding, as transformers decides it: not where both are stored and
    differ. Of equal ones the first is kept."""
    if not config.tie_word_embeddings:
        heads = [way.name for slot in _ends(family, config) if slot.role is Role.OUTPUT for way in slot.ways]
        if not any(name in stored for name in heads):
            raise CheckpointError(
                f"{path}: {heads[-1]} is missing and tie_word_embeddings is not set; is the download "
                "complete?"
            )
        return False
    slots = [slot for slot in _ends(family, config) if slot.role in (Role.EMBEDDING, Role.OUTPUT)]
    names = dict.fromkeys(way.name for slot in slots for way in slot.ways)
    first, *copies = [name for name in names if name in stored] or [""]
    if not all(_same(stored[first], stored[copy]) for copy in copies):
        return False
    for copy in copies:
        del stored[copy]
    return True


def _same(one: Stored, two: Stored, rows: int = 1024) -> bool:
    """Whether two matrices hold the same numbers."""
    if one.shape != two.shape or len(one.shape) != 2:
        return False
    parts = (range(at, min(at + rows, one.shape[0])) for at in range(0, one.shape[0], rows))
    return all(torch.equal(one.read(rows=part), two.read(rows=part)) for part in parts)


def shape_of(family: Family, config: Config) -> ModelShape:
    """The typed shape, its numbers within reason. FamilyError names a key that is none."""
    with foreign(FamilyError, f"{family.name}: config.json does not say how large the model is"):
        shape = family.shape(config)
        _check_shape(family, config, shape)
    return shape


def _check_shape(family: Family, config: Config, shape: ModelShape) -> None:
    """See `shape_of`; raises anything for values that are no numbers."""
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
    _check_heads(family, config, shape)
    for key in ("rms_norm_eps", "norm_eps", "layer_norm_eps", "layer_norm_epsilon"):
        epsilon = getattr(config, key, None)
        if epsilon is not None and not 0 <= epsilon < 1:
            raise FamilyError(
                f"{family.name}: config key {key} = {epsilon}: a number from 0 to 1 was expected"
            )
    check_experts(family, shape.experts, shape.experts_used)
    check_groups(family, config, shape.experts, shape.experts_used)


def _check_heads(family: Family, config: Config, shape: ModelShape) -> None:
    """FamilyError for heads that do not share others evenly."""
    pairs = [("linear_num_value_heads", "linear_num_key_heads")]
    if getattr(config, "kv_lora_rank", None) is None:  # else every query has keys of its own
        pairs.append(("num_attention_heads", "num_key_value_heads"))
    counts = {"num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads}
    for sharing, shared in pairs:
        many, each = (counts.get(key) or getattr(config, key, None) for key in (sharing, shared))
        if many is not None and each is not None and many % each:
            raise FamilyError(
                f"{family.name}: config key {sharing} = {many}: a multiple of {shared} = {each} was expected"
            )


def _assemble(
    family: Family, config: Config, shape: ModelShape, stored: Mapping[str, Stored]
) -> tuple[tuple[Weight, ...], dict[str, list[str]]]:
    """Every slot filled, every stored tensor claimed or skipped on purpose."""
    claimed: set[str] = set()
    found: list[Weight] = []
    for number, slot in every_slot(family, config, shape):
        weight = weight_of(slot, number, shape, stored)
        if weight is not None:
            claimed |= {renamed(family, each.name) for each in weight.origin.stored}
            found.append(weight)
    skipped = _left_out(family, config, (name for name in stored if name not in claimed), stored)
    return head_last(found), skipped


def _constants(family: Family, config: Config, stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """Numbers that are stored, and made of the config as well. CheckpointError where they are others."""
    with foreign(FamilyError, f"{family.name}: config.json does not say what checkpoints hold as well"):
        there = {name: told for name, told in family.constants(config).items() if name in stored}
    for name, told in there.items():
        if stored[name].dtype not in WHOLE:
            raise CheckpointError(
                f"tensor {name} is stored as {stored[name].dtype}; expected {' or '.join(WHOLE)}; download "
                "it again"
            )
        found = read_part(stored[name].parts[""])
        held = tuple(found.flatten().tolist())
        if held != told:
            raise CheckpointError(
                f"tensor {name} holds {few(held, 3)}, config.json makes it {few(told, 3)}; are both of one "
                "download?"
            )
    return {name: stored[name] for name in there}


def head_last(weights: Iterable[Weight]) -> tuple[Weight, ...]:
    """What the head is fed is known when everything before it has been rounded."""
    return tuple(sorted(weights, key=lambda weight: weight.role is Role.OUTPUT))


def every_slot(family: Family, config: Config, shape: ModelShape) -> Iterator[tuple[int | None, Slot]]:
    """The slots of a model, each with its layer; those outside of layers first."""
    yield from ((None, slot) for slot in _ends(family, config))
    for number in range(shape.layers):
        yield from ((number, slot) for slot in slots_of(family, config, number))


def _ends(family: Family, config: Config) -> tuple[Slot, ...]:
    """The slots outside of layers."""
    with foreign(FamilyError, f"{family.name}: config.json does not say what is outside of layers"):
        return family.ends(config)


def slots_of(family: Family, config: Config, layer: int) -> tuple[Slot, ...]:
    """The slots of a decoder layer; FamilyError when the config's lists do not get that far."""
    with foreign(FamilyError, f"{family.name}: config.json does not say what layer {layer} is"):
        slots = family.layer(config, layer)
        return tuple(slot for slot in slots if slot.role not in SHARED) if no_shared(config) else slots


def _unknown(family: Family, config: Config, stored: Stored) -> FamilyError:
    """The error for a tensor that no slot names; of a bias it names the key that adds it, of a shared expert
    the key by which there is none."""
    shown = f"tensor {stored.name} {list(stored.shape)}"
    if (none := no_shared(config)) and "shared" in stored.name:
        return FamilyError(f"{family.name}: config key {none} = 0: no shared experts, but there is {shown}")
    key = "attention_bias" if "attn" in stored.name else "mlp_bias"
    if stored.name.endswith(".bias") and getattr(config, key, False) is True:
        return FamilyError(
            f"{family.name}: config key {key} = True: only models without these biases are described "
            f"({shown}); please report the model"
        )
    return FamilyError(
        f"{family.name}: {shown} is unknown, and is not dropped silently; please report the model"
    )


def _left_out(
    family: Family, config: Config, names: Iterable[str], stored: Mapping[str, Stored]
) -> dict[str, list[str]]:
    """Tensors that no slot names, by the reason. FamilyError for one without any."""
    with foreign(FamilyError, f"{family.name}: config.json does not say which tensors do not count"):
        reasons = [(re.compile(pattern), reason) for pattern, reason in family.skipped(config).items()]
    skipped: dict[str, list[str]] = {}
    for name in names:
        if 0 in stored[name].shape:  # of no shared experts transformers saves matrices all the same
            skipped.setdefault(EMPTY, []).append(name)
            continue
        reason = next((reason for pattern, reason in reasons if pattern.fullmatch(name)), None)
        if reason is None:
            layer = re.search(r"layers\.(\d+)\.", name)
            layers = config.num_hidden_layers
            if layer is not None and int(layer[1]) >= layers:
                raise CheckpointError(
                    f"tensors of layer {layer[1]} exist ({name}), but config.json says {layers} layers; are "
                    "both of one download?"
                )
            raise _unknown(family, config, stored[name])
        skipped.setdefault(reason, []).append(name)
    return skipped
