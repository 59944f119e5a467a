"""llama.cpp's `llama4`: chunks, attention that grows with the position and layers without rotation are fixed
in its graph."""

from __future__ import annotations

from collections.abc import Iterator

from moequant.containers.gguf.families.base import Export, Key, only
from moequant.containers.gguf.families.keys import LLAMA3, expert_counts, head_sizes, rope_factors, sizes
from moequant.families import Config

ARCH = "llama4"

CHUNK = 8192
"""Tokens of a chunk, and of the steps in which attention grows."""

WITHOUT_NORM = 128
"""Experts of the one model whose queries and keys are not normalised."""


def keys(config: Config) -> tuple[Key, ...]:
    """Keys of the file. What the config calls `intermediate_size` is the experts' width."""
    width = Key("feed_forward_length", "u32", int(config.intermediate_size_mlp))
    chunked = [kind == "chunked_attention" for kind in config.layer_types]
    return (
        *(width if key.name == width.name else key for key in sizes(config)),
        *expert_counts(config),
        Key("expert_feed_forward_length", "u32", int(config.intermediate_size)),
        Key("interleave_moe_layer_step", "u32", int(config.interleave_moe_layer_step)),
        Key("attention.sliding_window_pattern", "bools", chunked),
        *head_sizes(config, in_tensors=(LLAMA3,)),
    )


def complaints(config: Config) -> Iterator[str]:
    """What the graph takes for granted."""
    layers, step = config.num_hidden_layers, config.interleave_moe_layer_step
    yield from only(config, ARCH, "hidden_act", "silu")
    yield from only(config, ARCH, "attention_bias", False)
    yield from only(config, ARCH, "moe_layers", list(range(step - 1, layers, step)))
    yield from only(config, ARCH, "use_qk_norm", config.num_local_experts != WITHOUT_NORM)
    rotated = [int((layer + 1) % 4 != 0) for layer in range(layers)]
    yield from only(config, ARCH, "no_rope_layers", rotated)
    kinds = ["chunked_attention" if rotates else "full_attention" for rotates in rotated]
    yield from only(config, ARCH, "layer_types", kinds)
    if min(CHUNK, config.attention_chunk_size or CHUNK, config.floor_scale) < config.max_position_embeddings:
        yield from only(config, ARCH, "attention_chunk_size", CHUNK)
        yield from only(config, ARCH, "attn_temperature_tuning", True)
        yield from only(config, ARCH, "floor_scale", CHUNK)
        yield from only(config, ARCH, "attn_scale", 0.1)


LLAMA4 = Export(ARCH, keys, complaints, computed=rope_factors)
