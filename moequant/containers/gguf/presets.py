"""llama.cpp's preset rules: which type `llama-quantize` gives every tensor, and so how large its file is.

A preset of ours may not be larger than llama.cpp's of the same name. These are the
rules of `llama_tensor_get_type_impl` (b11434, with an importance matrix) for the tensors
that our families have, kept as they are, `n_expert == 8` tests and all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moequant.values import Role, Weight

if TYPE_CHECKING:
    from moequant.containers.gguf.export import Exported

BASE_TYPES: Mapping[str, str] = {
    "F32": "F32",
    "BF16": "BF16",
    "F16": "F16",
    "Q8_0": "Q8_0",
    "Q6_K": "Q6_K",
    "Q5_K_M": "Q5_K",
    "Q5_K_S": "Q5_K",
    "Q5_1": "Q5_1",
    "Q5_0": "Q5_0",
    "Q4_K_M": "Q4_K",
    "Q4_K_S": "Q4_K",
    "Q4_1": "Q4_1",
    "Q4_0": "Q4_0",
    "IQ4_NL": "IQ4_NL",
    "IQ4_XS": "IQ4_XS",
    "Q3_K_L": "Q3_K",
    "Q3_K_M": "Q3_K",
    "Q3_K_S": "Q3_K",
    "IQ3_M": "IQ3_S",
    "IQ3_S": "IQ3_S",
    "IQ3_XS": "IQ3_S",
    "IQ3_XXS": "IQ3_XXS",
    "Q2_K": "Q2_K",
    "Q2_K_S": "Q2_K",
    "IQ2_M": "IQ2_S",
    "IQ2_S": "IQ2_XS",
    "IQ2_XS": "IQ2_XS",
    "IQ2_XXS": "IQ2_XXS",
    "IQ1_M": "IQ1_M",
    "IQ1_S": "IQ1_S",
}
"""Preset name -> the type that most of the file has; the largest first."""

LEGACY = frozenset({"Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL"})
"""Presets that people ask for because of the type's kernels: the types are llama.cpp's, not a size."""

UNQUANTIZED = frozenset({"F32", "BF16", "F16", "I32"})
"""Types that round nothing worth a measurement, and the presets called after them."""

FILE_TYPES: Mapping[str, int] = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q2_K": 10,
    "Q3_K_S": 11,
    "Q3_K_M": 12,
    "Q3_K_L": 13,
    "Q4_K_S": 14,
    "Q4_K_M": 15,
    "Q5_K_S": 16,
    "Q5_K_M": 17,
    "Q6_K": 18,
    "IQ2_XXS": 19,
    "IQ2_XS": 20,
    "Q2_K_S": 21,
    "IQ3_XS": 22,
    "IQ3_XXS": 23,
    "IQ1_S": 24,
    "IQ4_NL": 25,
    "IQ3_S": 26,
    "IQ3_M": 27,
    "IQ2_S": 28,
    "IQ2_M": 29,
    "IQ4_XS": 30,
    "IQ1_M": 31,
    "BF16": 32,
}
"""Preset name -> GGUF's `general.file_type`."""

MOSTLY: Mapping[str, str] = {
    "Q2_K": "Q2_K_S",
    "Q3_K": "Q3_K_S",
    "Q4_K": "Q4_K_S",
    "Q5_K": "Q5_K_S",
    "IQ2_S": "IQ2_M",
}
"""A type -> the preset that is mostly of it, where the preset has another name."""

_FALLBACKS: Mapping[str, str] = {
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
}
"""What llama-quantize takes instead when 256 does not divide the rows."""

_VALUES = frozenset({Role.ATTN_V, Role.ATTN_QKV})
"""Projections that hold values: llama.cpp treats a tensor of queries, keys and values as it treats values."""

_LOW = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M"})
"""Presets at 1 and 2 bits, for which llama.cpp has rules of their own."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What llama.cpp's rules look at: layers, experts per layer, query heads per key head, tied head."""

    layers: int
    experts: int
    gqa: int
    tied: bool


def facts(exported: Exported) -> ModelFacts:
    """What the rules look at, of a model."""
    shape, told = exported.checkpoint.shape, exported.metadata
    heads, of_keys = (told.get(f"{exported.arch}.attention.{key}") for key in ("head_count", "head_count_kv"))
    gqa = (
        heads // of_keys
        if isinstance(heads, int) and isinstance(of_keys, int)
        else shape.heads // shape.kv_heads
    )
    layers = int(told[f"{exported.arch}.block_count"])
    return ModelFacts(layers, shape.experts, gqa, shape.tied)


def llama_cpp_types(preset: str, weights: Iterable[Weight], facts: ModelFacts) -> dict[str, str]:
    """Weight name -> the type `llama-quantize --imatrix` gives it under `preset`.

    Weights are in file order: some of the rules count the tensors of a kind.
    """
    weights = tuple(weights)
    base = BASE_TYPES[preset]
    seen: Counter[str] = Counter()
    values = sum(weight.role in _VALUES for weight in weights)
    types = {}
    for weight in weights:
        kind = "down" if weight.role.endswith("down") else weight.role  # of experts, shared and dense alike
        kind = Role.ATTN_V if weight.role in _VALUES else kind
        types[weight.name] = _type(preset, base, weight, _Place(seen[kind], values, facts))
        seen[kind] += 1
    return types


def mostly(formats: Iterable[tuple[str, int]]) -> str:
    """The preset that names a file of tensors (type, bytes): that of the type with the most bytes."""
    totals: Counter[str] = Counter()
    for name, size in formats:
        totals[name] += size
    names = [name for name, _ in totals.most_common() if MOSTLY.get(name, name) in FILE_TYPES]
    return MOSTLY.get(names[0], names[0]) if names else "F32"


@dataclass(frozen=True, slots=True)
class _Place:
    """How many tensors of this kind came before, how many value projections there are, and the model."""

    index: int
    values: int
    facts: ModelFacts


def _type(preset: str, base: str, weight: Weight, place: _Place) -> str:
    if weight.fixed_type is not None:
        return weight.fixed_type
    if base in UNQUANTIZED:
        return base
    chosen = _rule(preset, base, weight, place)
    if weight.n_in % 256 == 0 or chosen not in _FALLBACKS:
        return chosen if weight.n_in % 32 == 0 else "F16"
    return _FALLBACKS[chosen] if weight.n_in % 32 == 0 else "F16"


def _rule(preset: str, base: str, weight: Weight, place: _Place) -> str:
    if weight.role is Role.OUTPUT or (weight.role in (Role.EMBEDDING, Role.LOOKUP) and place.facts.tied):
        return _head(preset, base, weight)
    if weight.role in (Role.EMBEDDING, Role.LOOKUP):
        return _embedding(preset, base)
    if preset in _LOW:
        return _low(preset, base, weight, place)
    layer, facts = weight.layer or 0, place.facts
    eight = facts.experts == 8
    match weight.role:
        case role if role in _VALUES:
            return "Q8_0" if eight else _attn_v(preset, base, place)
        case Role.ATTN_K if eight:
            return "Q8_0"
        case Role.ATTN_Q | Role.ATTN_K:
            return {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}.get(preset, base)
        case role if role.endswith("down"):
            return _down(preset, base, layer, facts)
        case Role.ATTN_OUT if eight:
            small = base.startswith(("Q5", "Q6", "Q8")) or preset in ("Q2_K_S", "Q3_K_L", "Q4_0", "Q4_1")
            return base if small else "Q5_K"
        case Role.ATTN_OUT:
            raised = {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K", "IQ3_XXS": "IQ3_S", "IQ3_M": "Q4_K"}
            return raised.get(preset, base)
        case role if role.endswith(("gate", "up")) and preset == "IQ3_XS":
            return "IQ3_XXS" if facts.layers // 8 <= layer < 7 * facts.layers // 8 else base
    return base


def _head(preset: str, base: str, weight: Weight) -> str:
    block = 32 if base in LEGACY or base == "Q8_0" else 256
    if base == "Q8_0" or weight.n_in % block:
        return "Q8_0"
    return "Q5_K" if preset in _LOW or preset == "IQ3_XXS" else "Q6_K"


def _embedding(preset: str, base: str) -> str:
    if preset in ("IQ2_S", "IQ2_M", "IQ3_XXS"):
        return "IQ3_S"
    return "Q2_K" if preset in _LOW else base


def _low(preset: str, base: str, weight: Weight, place: _Place) -> str:
    facts, better = place.facts, "IQ3_S" if preset in ("IQ2_S", "IQ2_M") else "Q2_K"
    match weight.role:
        case role if role in _VALUES:
            return "Q4_K" if facts.gqa >= 4 or facts.experts >= 4 else better
        case Role.ATTN_K if facts.experts == 8:
            return "Q4_K"
        case role if role.endswith("down"):
            return better if place.index < facts.layers // 8 else base
        case Role.ATTN_OUT if facts.experts == 8:
            return "Q5_K"
        case Role.ATTN_OUT:
            return {"IQ1_S": "IQ2_XXS", "IQ1_M": "IQ2_XXS", "IQ2_S": "IQ3_S", "IQ2_M": "IQ3_S"}.get(
                preset, base
            )
    return base


def _attn_v(preset: str, base: str, place: _Place) -> str:
    many = place.facts.gqa >= 4
    match preset:
        case "Q2_K":
            return "Q4_K" if many else "Q3_K"
        case "Q2_K_S" | "IQ3_XXS" | "IQ3_XS" | "IQ3_S":
            return "Q4_K" if many else base
        case "IQ3_M":
            return "Q4_K"
        case "IQ4_NL" | "IQ4_XS":
            return "Q5_K" if many else base
        case "Q3_K_M":
            return "Q5_K" if place.index < 2 else "Q4_K"
        case "Q3_K_L":
            return "Q5_K"
        case "Q4_K_S":
            return "Q5_K" if place.index < 4 else base
        case "Q4_K_M" | "Q5_K_M":
            return "Q6_K" if use_more_bits(place.index, place.values) else base
    return base


def _down(preset: str, base: str, layer: int, facts: ModelFacts) -> str:
    layers = facts.layers
    match preset:
        case "Q2_K":
            return "Q3_K"
        case "Q2_K_S":
            return "Q4_K" if layer < layers // 8 else base
        case "IQ3_M":
            raised = layer < layers // 8 or (facts.experts == 8 and use_more_bits(layer, layers))
            return "Q4_K" if raised else base
        case "Q3_K_M":
            return "Q5_K" if layer < layers // 16 else "Q4_K"
        case "Q3_K_L":
            return "Q5_K"
        case "Q4_K_S":
            return "Q5_K" if layer < layers // 8 else base
        case "Q4_K_M" | "Q5_K_M":
            return "Q6_K" if use_more_bits(layer, layers) else base
        case "Q4_0" | "Q5_0":
            return preset.replace("_0", "_1") if layer < layers // 8 else base
    return base


def use_more_bits(layer: int, layers: int) -> bool:
    """llama.cpp's choice of layers that get more bits: both ends and every third between."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
