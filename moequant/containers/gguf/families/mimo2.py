"""llama.cpp's `mimo2`: other bases of rotation, other numbers of key heads, and sinks where there is a
window."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moequant.containers.gguf.families.base import Drafting, Export, Key, only
from moequant.containers.gguf.families.keys import (
    SIGMOID,
    experts,
    groups,
    head_widths,
    instead,
    rope,
    scoring,
    sizes,
    windows,
)
from moequant.families import Config
from moequant.families.mimo_v2_flash import has_window

ARCH = "mimo2"


def keys(config: Config) -> tuple[Key, ...]:
    """Keys of the file."""
    one, full = int(config.num_key_value_heads), config.rope_parameters["full_attention"]
    heads = [one * 2 if has_window(config, number) else one for number in range(config.num_hidden_layers)]
    value_length = Key("attention.value_length", "u32", int(config.v_head_dim))
    return (
        *instead(sizes(config), Key("attention.head_count_kv", "u32s", heads)),
        *experts(config, config.moe_intermediate_size),
        *scoring(SIGMOID, True),
        *groups(config),
        *windows(config),
        *instead(head_widths(config, _rotated(config, "full_attention")), value_length),
        *rope(config, full),
        Key("rope.freq_base_swa", "f32", float(config.rope_parameters["sliding_attention"]["rope_theta"])),
        *_value_scale(config),
    )


def _value_scale(config: Config) -> tuple[Key, ...]:
    """What values are multiplied by: 1 unless it is said."""
    told = config.attention_value_scale
    return () if told is None else (Key("attention.value_scale", "f32", float(told)),)


def _rotated(config: Config, kind: str) -> float:
    """The share of each head that is rotated."""
    return float(config.rope_parameters[kind].get("partial_rotary_factor", 0.334))


def complaints(config: Config) -> Iterator[str]:
    """What the graph takes for granted."""
    yield from only(config, ARCH, "hidden_act", "silu")
    yield from only(config, ARCH, "attention_bias", False)
    yield from only(config, ARCH, "norm_topk_prob", True)
    yield from only(config, ARCH, "routed_scaling_factor", 1.0)
    if set(config.layer_types) != {"full_attention", "sliding_attention"}:
        yield f"config key layer_types: llama.cpp's {ARCH!r} needs layers with a window, and others"
        return
    if any(each.get("rope_type", "default") != "default" for each in config.rope_parameters.values()):
        yield f"config key rope_parameters: llama.cpp's {ARCH!r} has one scaling for all layers"
    if _rotated(config, "full_attention") != _rotated(config, "sliding_attention"):
        yield f"config key partial_rotary_factor: llama.cpp's {ARCH!r} has one for all layers"


def predicted(config: Config, number: int) -> Mapping[str, Any]:
    """A layer that predicts has a window."""
    return {
        "attention.head_count_kv": 2 * int(config.num_key_value_heads),
        "attention.sliding_window_pattern": True,
    }


MIMO_V2_FLASH = Export(ARCH, keys, complaints, drafting=Drafting(predicted, most=16), own_head=True)
