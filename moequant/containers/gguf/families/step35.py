"""llama.cpp's `step35`: half of each head rotated in layers that look at everything, all of it in those with
a window. Norms are stored as 1 + w."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moequant.containers.gguf.families.base import Computed, Drafting, Export, FileTensor, Key, only
from moequant.containers.gguf.families.keys import (
    LLAMA3,
    SIGMOID,
    experts,
    rope,
    rope_factors,
    scoring,
    windows,
)
from moequant.families import Config
from moequant.families.predictions import last_of
from moequant.families.step3p7 import heads, predicted_kind
from moequant.values import Role, Weight
from moequant.values.ops import Plus

ARCH = "step35"

FULL, WINDOW = "full_attention", "sliding_attention"


def keys(config: Config) -> tuple[Key, ...]:
    """Keys of the file. The loader halves the rotated dimensions of layers that look at everything."""
    count, width = int(config.num_hidden_layers), int(config.head_dim)
    return (
        Key("context_length", "u32", int(config.max_position_embeddings)),
        Key("embedding_length", "u32", int(config.hidden_size)),
        Key("block_count", "u32", count),
        Key("feed_forward_length", "u32", int(config.intermediate_size)),
        Key("attention.head_count", "u32s", [heads(config, number) for number in range(count)]),
        Key("attention.head_count_kv", "u32", int(config.num_key_value_heads)),
        Key("attention.layer_norm_rms_epsilon", "f32", float(config.rms_norm_eps)),
        Key("vocab_size", "u32", int(config.vocab_size)),
        *experts(config, config.moe_intermediate_size, config.share_expert_dim),
        *scoring(SIGMOID, True, config.moe_router_scaling_factor),
        *windows(config),
        Key("rope.dimension_count", "u32", width),
        Key("attention.key_length", "u32", width),
        Key("attention.value_length", "u32", width),
        *rope(config, config.rope_parameters[FULL], in_tensors=(LLAMA3,)),
        Key("rope.freq_base_swa", "f32", float(config.rope_parameters[WINDOW]["rope_theta"])),
        *_clamps("swiglu_clamp_exp", config.swiglu_limits),
        *_clamps("swiglu_clamp_shexp", config.swiglu_limits_shared),
    )


def _clamps(name: str, limits: list[float | None] | None) -> tuple[Key, ...]:
    """How far activations go, layer by layer; 0: any far."""
    return (Key(name, "f32s", [float(limit or 0) for limit in limits]),) if limits else ()


def factors(config: Config) -> tuple[Computed, ...]:
    """What divides frequencies in layers that look at everything; as many as the others rotate."""
    found = config.rope_parameters[FULL]
    width = int(config.head_dim)
    return rope_factors(config, found, int(width * _rotated(found)), width // 2)


def _rotated(parameters: dict[str, Any]) -> float:
    """The share of each head that is rotated."""
    return float(parameters.get("partial_rotary_factor", 1.0))


def plus_one(config: Config, weight: Weight) -> tuple[FileTensor, ...] | None:
    """Norms as the file has them."""
    return (FileTensor(ops=(Plus(1.0),)),) if weight.role is Role.NORM else None


def complaints(config: Config) -> Iterator[str]:
    """What the graph takes for granted."""
    yield from only(config, ARCH, "hidden_act", "silu")
    yield from only(config, ARCH, "attention_bias", False)
    yield from only(config, ARCH, "mlp_bias", False)
    yield from only(config, ARCH, "query_pre_attn_scalar", config.head_dim)
    if set(config.layer_types) != {FULL, WINDOW}:
        yield f"config key layer_types: llama.cpp's {ARCH!r} needs layers with a window, and others"
        return
    full, window = (config.rope_parameters[kind] for kind in (FULL, WINDOW))
    if (_rotated(full), _rotated(window)) != (0.5, 1.0):
        yield (
            f"rope parameter partial_rotary_factor: llama.cpp's {ARCH!r} rotates half of each head, and "
            "all of it in layers with a window"
        )
    if window.get("rope_type", "default") != "default":
        yield f"rope scaling {window['rope_type']!r}: llama.cpp's {ARCH!r} scales no layer with a window"


def predicted(config: Config, number: int) -> Mapping[str, Any]:
    """A layer that predicts has heads of its own number; nothing is clamped in it."""
    kind = predicted_kind(config, number)
    return {
        "attention.head_count": heads(config, last_of(config.layer_types, kind)),
        "attention.sliding_window_pattern": kind == WINDOW,
        "swiglu_clamp_exp": 0.0,
        "swiglu_clamp_shexp": 0.0,
    }


STEP3P7 = Export(
    ARCH,
    keys,
    complaints,
    cut=plus_one,
    computed=factors,
    drafting=Drafting(predicted, most=16),
    own_head=True,
)
