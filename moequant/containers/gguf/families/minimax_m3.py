"""llama.cpp's `minimax-m3`: layers with experts have an indexer, those before have neither. Norms are stored
as 1 + w."""

from __future__ import annotations

from collections.abc import Iterator

from moequant.containers.gguf.families.base import Export, Key, dense_in_front, only
from moequant.containers.gguf.families.keys import (
    SIGMOID,
    experts,
    head_dim,
    head_sizes,
    instead,
    leading_dense,
    rotated_part,
    scoring,
    sizes,
)
from moequant.containers.gguf.families.step35 import plus_one
from moequant.families import Config
from moequant.families.minimax_m3 import SPARSE

ARCH = "minimax-m3"

NAMES = {
    "indexer.q": "indexer.q_proj.weight",
    "indexer.k": "indexer.k_proj.weight",
    "indexer.q_norm": "indexer.q_norm.weight",
}


def keys(config: Config) -> tuple[Key, ...]:
    """Keys of the file."""
    width = int(config.intermediate_size)
    return (
        *instead(sizes(config), Key("feed_forward_length", "u32", int(config.dense_intermediate_size))),
        *experts(config, width),
        Key("expert_shared_count", "u32", int(config.shared_intermediate_size) // width),
        *scoring(SIGMOID, True, config.routed_scaling_factor),
        Key("leading_dense_block_count", "u32", leading_dense(config)),
        *head_sizes(config, rotated_part(config)),
        Key("attention.indexer.head_count", "u32", int(config.index_n_heads)),
        Key("attention.indexer.key_length", "u32", int(config.index_head_dim)),
        Key("attention.indexer.top_k", "u32", int(config.index_topk_blocks)),
        Key("attention.indexer.block_size", "u32", int(config.index_block_size)),
        Key("attention.indexer.local_blocks", "u32", int(config.index_local_blocks)),
    )


def complaints(config: Config) -> Iterator[str]:
    """What the graph takes for granted."""
    yield from only(config, ARCH, "swiglu_alpha", 1.702)
    yield from only(config, ARCH, "swiglu_limit", 7.0)
    yield from only(config, ARCH, "index_n_heads", config.num_key_value_heads)
    yield from dense_in_front(config, ARCH)
    if config.shared_intermediate_size % config.intermediate_size:
        yield (
            f"config key shared_intermediate_size = {config.shared_intermediate_size}: llama.cpp's {ARCH!r} "
            f"takes multiples of intermediate_size = {config.intermediate_size}"
        )
    kinds = zip(config.layer_types, config.mlp_layer_types, strict=True)
    if any((attention == SPARSE) != (ffn == "sparse") for attention, ffn in kinds):
        yield f"config key layer_types: llama.cpp's {ARCH!r} has indexers in layers with experts alone"
    if (rotated := int(head_dim(config) * rotated_part(config))) != config.rotary_dim:
        yield (
            f"config key rotary_dim = {config.rotary_dim}: transformers rotates {rotated} dimensions, by "
            "partial_rotary_factor; they must agree"
        )


def warnings(config: Config) -> tuple[str, ...]:
    """What llama.cpp computes a little differently."""
    blocks, block = int(config.index_topk_blocks), int(config.index_block_size)
    if blocks * block >= config.max_position_embeddings:
        return ()
    return (
        f"the model attends to {blocks} blocks of {block} tokens that it chooses; llama.cpp does so only "
        f"with flash attention: for contexts above {blocks * block} tokens keep -fa on",
    )


MINIMAX_M3 = Export(ARCH, keys, complaints, NAMES, cut=plus_one, warnings=warnings, own_head=True)
