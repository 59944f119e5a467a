"""llama.cpp's preset rules: which type `llama-quantize` gives every tensor, and so how large its file is.

A preset of ours may not be larger than llama.cpp's of the same name. These are the
rules of `llama_tensor_get_type` (b11434) for the tensors that our families have, kept
as they are, `n_expert == 8` tests and all.
"""

from __future__ import annotations

from dataclasses import dataclass

from moequant.values import Role, Weight

BASE_TYPES = {
    "F32": "F32",
    "BF16": "BF16",
    "F16": "F16",
    "Q8_0": "Q8_0",
    "Q6_K": "Q6_K",
    "Q5_K_M": "Q5_K",
    "Q5_K_S": "Q5_K",
    "Q4_K_M": "Q4_K",
    "Q4_K_S": "Q4_K",
    "Q3_K_L": "Q3_K",
    "Q3_K_M": "Q3_K",
    "Q3_K_S": "Q3_K",
    "Q2_K": "Q2_K",
    "Q2_K_S": "Q2_K",
}
"""Preset name -> the type that most of the file has."""

FILE_TYPES = {
    "F32": 0,
    "F16": 1,
    "Q8_0": 7,
    "Q2_K": 10,
    "Q3_K_S": 11,
    "Q3_K_M": 12,
    "Q3_K_L": 13,
    "Q4_K_S": 14,
    "Q4_K_M": 15,
    "Q5_K_S": 16,
    "Q5_K_M": 17,
    "Q6_K": 18,
    "Q2_K_S": 21,
    "BF16": 32,
}
"""Preset name -> GGUF's `general.file_type`."""

_FALLBACKS = {
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
"""What llama-quantize takes instead when 256 does not divide the rows."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What llama.cpp's rules look at: layers, experts per layer, query heads per key head, tied head."""

    layers: int
    experts: int
    gqa: int
    tied: bool


def llama_cpp_type(preset: str, weight: Weight, facts: ModelFacts) -> str:
    """The type `llama-quantize --imatrix` gives `weight` under `preset`."""
    base = BASE_TYPES[preset]
    if weight.role.keeps_precision or len(weight.shape) < 2:
        return "F32"
    if base in ("F32", "BF16", "F16"):
        return base
    chosen = _rule(preset, base, weight, facts)
    if weight.n_in % 256 == 0 or chosen not in _FALLBACKS:
        return chosen if weight.n_in % 32 == 0 else "F16"
    return _FALLBACKS[chosen] if weight.n_in % 32 == 0 else "F16"


def _rule(preset: str, base: str, weight: Weight, facts: ModelFacts) -> str:
    layer = weight.layer or 0
    match weight.role:
        case Role.OUTPUT:
            return "Q8_0" if base == "Q8_0" or weight.n_in % 256 else "Q6_K"
        case Role.EMBEDDING if facts.tied:
            return "Q8_0" if base == "Q8_0" or weight.n_in % 256 else "Q6_K"
        case Role.ATTN_V:
            return "Q8_0" if facts.experts == 8 else _attn_v(preset, base, layer, facts)
        case Role.ATTN_K if facts.experts == 8:
            return "Q8_0"
        case Role.DOWN | Role.DENSE_DOWN:
            return _down(preset, base, layer, facts.layers)
        case Role.ATTN_OUT if facts.experts == 8:
            kept = ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M")
            return "Q5_K" if preset in kept else base
        case Role.ATTN_OUT:
            return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(preset, base)
    return base


def _attn_v(preset: str, base: str, layer: int, facts: ModelFacts) -> str:
    many = facts.gqa >= 4
    match preset:
        case "Q2_K":
            return "Q4_K" if many else "Q3_K"
        case "Q2_K_S":
            return "Q4_K" if many else base
        case "Q3_K_M":
            return "Q5_K" if layer < 2 else "Q4_K"
        case "Q3_K_L":
            return "Q5_K"
        case "Q4_K_S":
            return "Q5_K" if layer < 4 else base
        case "Q4_K_M" | "Q5_K_M":
            return "Q6_K" if use_more_bits(layer, facts.layers) else base
    return base


def _down(preset: str, base: str, layer: int, layers: int) -> str:
    match preset:
        case "Q2_K":
            return "Q3_K"
        case "Q2_K_S":
            return "Q4_K" if layer < layers // 8 else base
        case "Q3_K_M":
            return "Q5_K" if layer < layers // 16 else "Q4_K"
        case "Q3_K_L":
            return "Q5_K"
        case "Q4_K_S":
            return "Q5_K" if layer < layers // 8 else base
        case "Q4_K_M" | "Q5_K_M":
            return "Q6_K" if use_more_bits(layer, layers) else base
    return base


def use_more_bits(layer: int, layers: int) -> bool:
    """llama.cpp's choice of layers that get more bits: both ends and every third between."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
