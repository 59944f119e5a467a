"""llama.cpp's `laguna`: rotary positions of their own, without scaling, in layers with a window."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moequant.containers.gguf.families.base import Export, Key, dense_in_front, only
from moequant.containers.gguf.families.keys import (
    SIGMOID,
    experts,
    head_dim,
    head_widths,
    instead,
    leading_dense,
    rope,
    scoring,
    sizes,
    windows,
)
from moequant.families import Config

ARCH = "laguna"


def keys(config: Config) -> tuple[Key, ...]:
    """Keys of the file."""
    heads = Key("attention.head_count", "u32s", list(config.num_attention_heads_per_layer))
    found = config.rope_parameters["full_attention"]
    return (
        *instead(sizes(config), heads),
        *experts(config, config.moe_intermediate_size, config.shared_expert_intermediate_size),
        *scoring(SIGMOID, True, config.moe_routed_scaling_factor),
        Key("leading_dense_block_count", "u32", leading_dense(config)),
        *windows(config),
        *head_widths(config, _rotated(found)),
        *rope(config, found),
        *_short(config),
    )


def _short(config: Config) -> tuple[Key, ...]:
    """Rotary positions of the layers with a window."""
    if "sliding_attention" not in config.layer_types:
        return ()
    found = config.rope_parameters["sliding_attention"]
    return (
        Key("rope.dimension_count_swa", "u32", int(head_dim(config) * _rotated(found))),
        Key("rope.freq_base_swa", "f32", float(found["rope_theta"])),
    )


def _rotated(parameters: dict[str, Any]) -> float:
    """The share of each head that is rotated."""
    return float(parameters.get("partial_rotary_factor") or 1.0)


def complaints(config: Config) -> Iterator[str]:
    """What the graph takes for granted."""
    yield from only(config, ARCH, "hidden_act", "silu")
    yield from only(config, ARCH, "attention_bias", False)
    yield from dense_in_front(config, ARCH)
    kinds = set(config.layer_types)
    if "full_attention" not in kinds:
        yield f"config key layer_types: llama.cpp's {ARCH!r} needs layers that look at everything"
    if "sliding_attention" in kinds:
        kind = config.rope_parameters["sliding_attention"].get("rope_type", "default")
        if kind != "default":
            yield f"rope scaling {kind!r}: llama.cpp's {ARCH!r} scales no layer with a window"
        parts = {_rotated(config.rope_parameters[each]) for each in kinds}
        if config.layer_types[0] == "sliding_attention" and len(parts) > 1:
            yield (
                f"config key layer_types: llama.cpp's {ARCH!r} rotates as much of each head in layers that "
                "look at everything as in the first, which has a window"
            )


LAGUNA = Export(ARCH, keys, complaints)
