"""Multi-head latent attention (DeepSeek-V2, 2024): keys and values come from one latent vector a token."""

from __future__ import annotations

from dataclasses import replace

from moequant.families.base import Config, Slot
from moequant.families.blocks import linear, norm, seen
from moequant.values import Role, Site

LATENT_KEYS = frozenset(
    {
        "kv_lora_rank",
        "q_lora_rank",
        "qk_rope_head_dim",
        "qk_nope_head_dim",
        "qk_head_dim",
        "v_head_dim",
        "rope_interleave",
    }
)
"""Config keys of latent attention."""


def latent_attention(config: Config, layer: int) -> tuple[Slot, ...]:
    """Norms and projections of a layer; queries come from a latent of their own where `q_lora_rank` is
    given."""
    into = seen(layer, "attn.input", "self_attn.kv_a_proj_with_mqa")
    latent = seen(layer, "attn.latent", "self_attn.kv_b_proj")
    out = seen(layer, "attn.output", "self_attn.o_proj")
    return (
        norm(layer, "attn_norm", "input_layernorm"),
        *_queries(config, layer, into),
        *linear(layer, "attn_kv_a", Role.KV_A, "self_attn.kv_a_proj_with_mqa", into, biased=True),
        norm(layer, "attn_kv_a_norm", "self_attn.kv_a_layernorm"),
        *linear(layer, "attn_kv_b", Role.KV_B, "self_attn.kv_b_proj", latent),
        *linear(layer, "attn_out", Role.ATTN_OUT, "self_attn.o_proj", out, biased=True, adds=True),
        norm(layer, "ffn_norm", "post_attention_layernorm"),
    )


def query_module(config: Config) -> str:
    """The module within a layer that makes the queries of all heads."""
    return "self_attn.q_proj" if config.q_lora_rank is None else "self_attn.q_b_proj"


def _queries(config: Config, layer: int, into: Site) -> tuple[Slot, ...]:
    if config.q_lora_rank is None:
        # Of Kimi-K2.5, transformers 5.24 saves none: it takes them for the eye's.
        plain = linear(layer, "attn_q", Role.ATTN_Q, "self_attn.q_proj", into)
        return tuple(replace(slot, asked="q_lora_rank = None") for slot in plain)
    latent = seen(layer, "attn.q_latent", "self_attn.q_b_proj")
    return (
        *linear(layer, "attn_q_a", Role.Q_A, "self_attn.q_a_proj", into, biased=True),
        norm(layer, "attn_q_a_norm", "self_attn.q_a_layernorm"),
        *linear(layer, "attn_q_b", Role.Q_B, "self_attn.q_b_proj", latent),
    )
