"""llama.cpp's `exaone-moe`: it rotates the layers with a window, and no others."""

from __future__ import annotations

from collections.abc import Iterator

from moequant.containers.gguf.families.base import Export, Key, dense_in_front, only
from moequant.containers.gguf.families.keys import (
    LLAMA3,
    SIGMOID,
    experts,
    groups,
    head_sizes,
    leading_dense,
    rope_factors,
    scoring,
    sizes,
    windows,
)
from moequant.families import Config

ARCH = "exaone-moe"


def keys(config: Config) -> tuple[Key, ...]:
    """Keys of the file."""
    width, shared = int(config.moe_intermediate_size), int(config.num_shared_experts)
    return (
        *sizes(config),
        *experts(config, width, width * shared),
        *scoring(SIGMOID, config.norm_topk_prob, config.routed_scaling_factor),
        *groups(config),
        Key("expert_shared_count", "u32", shared),
        Key("leading_dense_block_count", "u32", leading_dense(config)),
        *windows(config),
        *head_sizes(config, in_tensors=(LLAMA3,)),
    )


def complaints(config: Config) -> Iterator[str]:
    """What the graph takes for granted."""
    yield from only(config, ARCH, "hidden_act", "silu")
    yield from dense_in_front(config, ARCH)
    if config.sliding_window is None or "sliding_attention" not in config.layer_types:
        yield f"config key sliding_window: llama.cpp's {ARCH!r} needs layers with a window"


EXAONE_MOE = Export(ARCH, keys, complaints, computed=rope_factors, own_head=True)
