"""llama.cpp's `ernie4_5-moe`: every layer behind the leading dense ones has experts. Heads are stored as it
rotates them, in pairs."""

from __future__ import annotations

from collections.abc import Iterator

from moequant.containers.gguf.families.base import Export, Key, only
from moequant.containers.gguf.families.keys import experts, head_sizes, sizes
from moequant.families import Config

ARCH = "ernie4_5-moe"


def keys(config: Config) -> tuple[Key, ...]:
    """Keys of the file."""
    width, shared = int(config.moe_intermediate_size), int(config.moe_num_shared_experts)
    return (
        *sizes(config),
        *experts(config, width, width * shared),
        Key("expert_shared_count", "u32", shared),
        Key("leading_dense_block_count", "u32", int(config.moe_layer_start_index)),
        Key("interleave_moe_layer_step", "u32", int(config.moe_layer_interval)),
        *head_sizes(config),
    )


def complaints(config: Config) -> Iterator[str]:
    """What the graph takes for granted."""
    yield from only(config, ARCH, "hidden_act", "silu")
    yield from only(config, ARCH, "moe_layer_interval", 1)
    yield from only(config, ARCH, "moe_layer_end_index", config.num_hidden_layers - 1)


ERNIE4_5_MOE = Export(ARCH, keys, complaints)
