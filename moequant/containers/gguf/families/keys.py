"""Keys that families share: sizes, rotary positions, experts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from moequant.containers.gguf.families.base import Key
from moequant.errors import FamilyError
from moequant.families import Config

_SCALING = frozenset(
    {
        "type",
        "rope_type",
        "rope_theta",
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "partial_rotary_factor",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "truncate",
        "llama_4_scaling_beta",
        "max_position_embeddings",
    }
)


def sizes(config: Config) -> tuple[Key, ...]:
    """Shape and norm keys that every llama-like architecture reads."""
    heads = int(config.num_attention_heads)
    width = getattr(config, "intermediate_size", None)
    return (
        Key("context_length", "u32", int(config.max_position_embeddings)),
        Key("embedding_length", "u32", int(config.hidden_size)),
        Key("block_count", "u32", int(config.num_hidden_layers)),
        *([] if width is None else [Key("feed_forward_length", "u32", int(width))]),
        Key("attention.head_count", "u32", heads),
        Key("attention.head_count_kv", "u32", int(getattr(config, "num_key_value_heads", None) or heads)),
        Key("attention.layer_norm_rms_epsilon", "f32", float(config.rms_norm_eps)),
        Key("vocab_size", "u32", int(config.vocab_size)),
    )


def expert_counts(config: Config) -> tuple[Key, ...]:
    """How many experts there are, and how many a token is sent to."""
    count = getattr(config, "num_local_experts", None) or config.num_experts
    return (
        Key("expert_count", "u32", int(count)),
        Key("expert_used_count", "u32", int(config.num_experts_per_tok)),
    )


SOFTMAX, SIGMOID = 1, 2
"""llama.cpp's numbers of how a router scores."""


def routing(config: Config, gating: int, dense: int) -> tuple[Key, ...]:
    """How DeepSeek's routers score, group and scale, and what is beside the routed experts: `dense` layers
    in front, shared experts."""
    return (
        *expert_counts(config),
        Key("leading_dense_block_count", "u32", dense),
        Key("expert_feed_forward_length", "u32", int(config.moe_intermediate_size)),
        Key("expert_shared_count", "u32", int(config.n_shared_experts)),
        Key("expert_weights_scale", "f32", float(config.routed_scaling_factor)),
        Key("expert_weights_norm", "bool", bool(config.norm_topk_prob)),
        Key("expert_gating_func", "u32", gating),
        Key("expert_group_count", "u32", int(config.n_group or 1)),
        Key("expert_group_used_count", "u32", int(config.topk_group or 1)),
    )


def head_dim(config: Config) -> int:
    """Width of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rotated_part(config: Config) -> int:
    """How many dimensions of a head are rotated, in classes that look at `partial_rotary_factor`."""
    return int(head_dim(config) * float((config.rope_parameters or {}).get("partial_rotary_factor", 1.0)))


def head_sizes(config: Config, rotated: int | None = None) -> tuple[Key, ...]:
    """Width of heads, how much of it is rotated (None: all), and the base of the rotation and its scaling."""
    width = head_dim(config)
    return (
        Key("rope.dimension_count", "u32", width if rotated is None else rotated),
        Key("attention.key_length", "u32", width),
        Key("attention.value_length", "u32", width),
        *rope(config),
    )


def rope(config: Config) -> tuple[Key, ...]:
    """Base and scaling of rotary positions.

    Raises FamilyError for a scaling that GGUF cannot express or that is not known here.
    """
    found = dict(config.rope_parameters or {})
    kind = found.get("rope_type", "default")
    if unknown := sorted(str(key) for key in found.keys() - _SCALING):
        raise FamilyError(f"rope scaling {kind!r}: key {unknown[0]} is not supported yet")
    base = Key("rope.freq_base", "f32", _number(found, "rope_theta", kind))
    if kind == "default":
        return (base,)
    if kind not in ("linear", "yarn"):
        raise FamilyError(f"rope scaling {kind!r} is not supported yet; known: default, linear, yarn")
    factor = _number(found, "factor", kind)
    keys = [base, Key("rope.scaling.type", "str", kind), Key("rope.scaling.factor", "f32", factor)]
    return (*keys, *(_yarn(config, found, factor) if kind == "yarn" else ()))


def _yarn(config: Config, found: Mapping[str, Any], factor: float) -> tuple[Key, ...]:
    original = found.get("original_max_position_embeddings") or config.max_position_embeddings
    keys = [Key("rope.scaling.original_context_length", "u32", int(original))]
    for name, key in (("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")):
        if found.get(name) is not None:
            keys.append(Key(f"rope.scaling.{key}", "f32", float(found[name])))
    if found.get("attention_factor") is not None:
        # llama.cpp multiplies its own factor, 1 + 0.1 ln(factor), by this key; the config gives the whole.
        own = 1.0 + 0.1 * math.log(factor) if factor > 1 else 1.0
        keys.append(Key("rope.scaling.yarn_attn_factor", "f32", float(found["attention_factor"]) / own))
    return tuple(keys)


def _number(found: Mapping[str, Any], name: str, kind: str) -> float:
    value = found.get(name)
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or value <= 0
    ):
        raise FamilyError(f"rope scaling {kind!r}: {name} is {value!r}; a number above 0 was expected")
    return float(value)
