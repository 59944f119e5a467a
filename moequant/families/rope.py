"""Rotary position keys: transformers' old and new spellings to GGUF's."""

from __future__ import annotations

from typing import Any

from moequant.errors import FamilyError
from moequant.families.base import Config

ROPE_CONFIG_KEYS = frozenset(
    {"rope_theta", "rope_scaling", "rope_parameters", "head_dim", "tie_word_embeddings", "sliding_window"}
)
"""Keys that this module and `checkpoint` interpret, the same way for every family."""

_SCALING_KEYS = frozenset(
    {
        "type",
        "rope_type",
        "rope_theta",
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "partial_rotary_factor",
    }
)


def head_dim(config: Config) -> int:
    """Width of one attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def rope_metadata(config: Config) -> list[tuple[str, str, Any]]:
    """Head width, rotary base and scaling as (key without arch, kind, value).

    Raises FamilyError for a scaling that GGUF cannot express or that is not known here.
    """
    scaling = dict(config.get("rope_parameters") or {})
    if older := dict(config.get("rope_scaling") or {}):
        scaling = scaling | older | {"rope_type": older.get("rope_type", older.get("type"))}
    theta: Any = scaling.get("rope_theta", config.get("rope_theta", 10000.0))
    kind = scaling.get("rope_type", "default")
    if unknown := sorted(scaling.keys() - _SCALING_KEYS):
        raise FamilyError(f"rope scaling {kind!r}: key {unknown[0]} is not supported yet")
    if scaling.get("partial_rotary_factor", 1.0) != 1.0:
        raise FamilyError("rope: partial_rotary_factor other than 1 is not supported yet")
    width = head_dim(config)
    keys: list[tuple[str, str, Any]] = [
        ("rope.dimension_count", "u32", width),
        ("attention.key_length", "u32", width),
        ("attention.value_length", "u32", width),
        ("rope.freq_base", "f32", float(theta)),
    ]
    if kind == "default":
        return keys
    if kind not in ("linear", "yarn"):
        raise FamilyError(f"rope scaling {kind!r} is not supported yet; known: default, linear, yarn")
    keys += [
        ("rope.scaling.type", "str", kind),
        ("rope.scaling.factor", "f32", float(scaling["factor"])),
    ]
    if kind == "yarn":
        original = scaling.get("original_max_position_embeddings") or config["max_position_embeddings"]
        keys.append(("rope.scaling.original_context_length", "u32", int(original)))
        for config_key, gguf_key in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
            if scaling.get(config_key) is not None:
                keys.append((f"rope.scaling.{gguf_key}", "f32", float(scaling[config_key])))
    return keys
