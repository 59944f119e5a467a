"""llama.cpp's `dbrx`."""

from __future__ import annotations

from collections.abc import Iterator

from moequant.containers.gguf.families.base import Export, Key, only
from moequant.containers.gguf.families.keys import head_sizes
from moequant.families import Config

ARCH = "dbrx"

EPSILON = 1e-5
"""That of torch's LayerNorm, which the class does not change."""


def keys(config: Config) -> tuple[Key, ...]:
    """Keys of the file."""
    attention, ffn = config.attn_config, config.ffn_config
    return (
        Key("context_length", "u32", int(config.max_seq_len)),
        Key("embedding_length", "u32", int(config.d_model)),
        Key("block_count", "u32", int(config.n_layers)),
        Key("feed_forward_length", "u32", int(ffn.ffn_hidden_size)),
        Key("attention.head_count", "u32", int(config.n_heads)),
        Key("attention.head_count_kv", "u32", int(attention.kv_n_heads)),
        Key("attention.layer_norm_epsilon", "f32", EPSILON),
        Key("attention.clamp_kqv", "f32", float(attention.clip_qkv or 0.0)),
        Key("vocab_size", "u32", int(config.vocab_size)),
        Key("expert_count", "u32", int(ffn.moe_num_experts)),
        Key("expert_used_count", "u32", int(ffn.moe_top_k)),
        *head_sizes(config),
    )


def complaints(config: Config) -> Iterator[str]:
    """What the graph takes for granted."""
    yield from only(config.ffn_config, ARCH, "ffn_act_fn", {"name": "silu"})
    yield from only(config.ffn_config, ARCH, "moe_normalize_expert_weights", 1)


DBRX = Export(ARCH, keys, complaints, names={"ffn_norm": "attn_output_norm.weight"})
