"""llama.cpp's `afmoe`: embeddings times the root of their width; every fourth layer is not rotated."""

from __future__ import annotations

from collections.abc import Iterator

from moequant.containers.gguf.families.base import Export, Key, only
from moequant.containers.gguf.families.keys import SIGMOID, experts, head_sizes, scoring, sizes, windows
from moequant.families import Config

ARCH = "afmoe"

NO_ROPE = 4
"""Every so many layers one is not rotated, whatever the file says."""


def keys(config: Config) -> tuple[Key, ...]:
    """Keys of the file."""
    return (
        *sizes(config),
        *experts(config, config.moe_intermediate_size),
        *scoring(SIGMOID, True, config.route_scale),
        Key("expert_shared_count", "u32", int(config.num_shared_experts)),
        Key("leading_dense_block_count", "u32", int(config.num_dense_layers)),
        *windows(config),
        *head_sizes(config),
    )


def complaints(config: Config) -> Iterator[str]:
    """What the graph takes for granted."""
    yield from only(config, ARCH, "hidden_act", "silu")
    yield from only(config, ARCH, "attention_bias", False)
    yield from only(config, ARCH, "mup_enabled", True)
    rotated = [kind == "sliding_attention" for kind in config.layer_types]
    if rotated != [(number + 1) % NO_ROPE != 0 for number in range(config.num_hidden_layers)]:
        yield f"config key layer_types: llama.cpp's {ARCH!r} rotates all but every fourth layer"


AFMOE = Export(ARCH, keys, complaints)
