"""llama.cpp's `deepseek2`: latent attention with the keys' half of kv_b absorbed into the queries."""

from __future__ import annotations

from collections.abc import Iterator

from moequant.containers.gguf.families.base import Export, FileTensor, Key, only
from moequant.containers.gguf.families.keys import expert_counts, rope, sizes
from moequant.families import Config
from moequant.families.mla import query_module
from moequant.values import Role, Site, Stack, Weight
from moequant.values.ops import Joined, Part, Stacked, Transposed

ARCH = "deepseek2"

SIGMOID = 2
"""llama.cpp's number of a router that scores by sigmoid; softmax is 1."""


def split_latent(config: Config, weight: Weight) -> tuple[FileTensor, ...] | None:
    """kv_b [H·(nope + v), r] as k_b [H, r, nope], fed by the unrotated part of the queries, and v_b [H·v, r],
    fed by the latent."""
    if weight.role is not Role.KV_B:
        return None
    heads, nope, v = config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim
    rank = config.kv_lora_rank
    queries = Site(
        f"layers.{weight.layer}.attn.q_nope",
        f"model.layers.{weight.layer}.{query_module(config)}",
        "output",
        (Stacked(heads, axis=-1), Part(0, nope, axis=-1)),
        heads=True,
    )
    keys = (Stacked(heads), Part(0, nope), Transposed())
    values = (Stacked(heads), Part(nope, nope + v), Joined())
    return (
        FileTensor("attn_k_b.weight", keys, "attn_k_b", Role.K_B, queries, Stack.HEADS),
        FileTensor("attn_v_b.weight", values, "attn_v_b", Role.V_B, shape=(heads, v, rank)),
    )


def latent_keys(config: Config) -> tuple[Key, ...]:
    """Sizes of latent attention. llama.cpp sees one key head, as wide as the latent and the rotated part."""
    rank, rotated = int(config.kv_lora_rank), int(config.qk_rope_head_dim)
    queries = (
        [] if config.q_lora_rank is None else [Key("attention.q_lora_rank", "u32", int(config.q_lora_rank))]
    )
    return (
        *queries,
        Key("attention.kv_lora_rank", "u32", rank),
        Key("attention.key_length", "u32", rank + rotated),
        Key("attention.value_length", "u32", rank),
        Key("attention.key_length_mla", "u32", int(config.qk_nope_head_dim) + rotated),
        Key("attention.value_length_mla", "u32", int(config.v_head_dim)),
        Key("rope.dimension_count", "u32", rotated),
        *rope(config),
        *_yarn(config),
    )


def _yarn(config: Config) -> tuple[Key, ...]:
    """How YaRN scales attention: llama.cpp divides the key by 0.1 again."""
    told = (config.rope_parameters or {}).get("mscale_all_dim")
    if (config.rope_parameters or {}).get("rope_type") != "yarn" or not told:
        return ()
    return (Key("rope.scaling.yarn_log_multiplier", "f32", 0.1 * float(told)),)


def one_key_head(keys: tuple[Key, ...]) -> tuple[Key, ...]:
    """The sizes with the number of key heads that llama.cpp sees."""
    return tuple(Key(k.name, k.kind, 1) if k.name == "attention.head_count_kv" else k for k in keys)


def routing_keys(config: Config) -> tuple[Key, ...]:
    """How the router of V3 scores, groups and scales."""
    return (
        Key("leading_dense_block_count", "u32", int(config.first_k_dense_replace)),
        Key("expert_feed_forward_length", "u32", int(config.moe_intermediate_size)),
        Key("expert_shared_count", "u32", int(config.n_shared_experts)),
        Key("expert_weights_scale", "f32", float(config.routed_scaling_factor)),
        Key("expert_weights_norm", "bool", bool(config.norm_topk_prob)),
        Key("expert_gating_func", "u32", SIGMOID),
        Key("expert_group_count", "u32", int(config.n_group or 1)),
        Key("expert_group_used_count", "u32", int(config.topk_group or 1)),
    )


def keys(config: Config) -> tuple[Key, ...]:
    """Keys of DeepSeek-V3."""
    return (
        *one_key_head(sizes(config)),
        *expert_counts(config),
        *routing_keys(config),
        *latent_keys(config),
    )


def complaints(config: Config) -> Iterator[str]:
    """What the graph takes for granted."""
    yield from only(config, ARCH, "hidden_act", "silu")
    yield from only(config, ARCH, "attention_bias", False)
    yield from only(config, ARCH, "rope_interleave", True)
    if config.q_lora_rank is None and config.num_hidden_layers not in (26, 27):
        yield (
            f"config key q_lora_rank = None: llama.cpp's {ARCH!r} takes queries without a latent only in "
            "models of 26 or 27 layers"
        )


DEEPSEEK_V3 = Export(ARCH, keys, complaints, cut=split_latent)
