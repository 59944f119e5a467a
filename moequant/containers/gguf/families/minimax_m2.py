"""llama.cpp's `minimax-m2`: it norms q and k across heads and renormalises the chosen weights."""

from __future__ import annotations

from collections.abc import Iterator

from moequant.containers.gguf.families.base import Export, Key, full_attention, only
from moequant.containers.gguf.families.keys import SIGMOID, expert_counts, head_sizes, rotated_part, sizes
from moequant.families import Config

ARCH = "minimax-m2"


def keys(config: Config) -> tuple[Key, ...]:
    """Keys of the file. All layers have experts, whose width is that of the feed-forward block."""
    return (
        *sizes(config),
        *expert_counts(config),
        Key("expert_feed_forward_length", "u32", int(config.intermediate_size)),
        Key("expert_gating_func", "u32", SIGMOID),
        *head_sizes(config, rotated_part(config)),
    )


def complaints(config: Config) -> Iterator[str]:
    """What the graph takes for granted."""
    yield from only(config, ARCH, "hidden_act", "silu")
    yield from full_attention(config, ARCH)


MINIMAX_M2 = Export(ARCH, keys, complaints, own_head=True)
