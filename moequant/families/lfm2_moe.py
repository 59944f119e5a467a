"""LFM2-MoE: short convolutions in most layers, attention in the others; dense layers first, a sigmoid router
whose correction only chooses."""

from __future__ import annotations

from moequant.families.base import Config, Family, Slot
from moequant.families.blocks import (
    SHAPE_KEYS,
    Experts,
    correction,
    gated_ffn,
    linear,
    moe_shape,
    norm,
    router,
    seen,
)
from moequant.families.blocks import ends as named_ends
from moequant.values import Role
from moequant.values.ops import Squeezed

NAMES = ("w1", "w3", "w2")
"""Gate, up and down."""


def is_conv(config: Config, number: int) -> bool:
    """Whether a layer has a convolution in place of attention."""
    return bool(config.layer_types[number] == "conv")


def layer(config: Config, number: int) -> tuple[Slot, ...]:
    """One decoder layer."""
    mixer = _convolution(number) if is_conv(config, number) else _attention(number)
    front = (norm(number, "attn_norm", "operator_norm"), *mixer, norm(number, "ffn_norm", "ffn_norm"))
    at = "feed_forward"
    if number < config.num_dense_layers:
        return (*front, *gated_ffn(number, at, names=NAMES))
    return (
        *front,
        router(number, f"{at}.gate", f"{at}.gate"),
        correction(number, f"{at}.expert_bias"),
        *Experts(config.moe_intermediate_size, f"{at}.experts", NAMES, f"{at}.experts").slots(number),
    )


def _attention(number: int) -> tuple[Slot, ...]:
    into = seen(number, "attn.input", "self_attn.q_proj")
    out = seen(number, "attn.output", "self_attn.out_proj")
    return (
        *linear(number, "attn_q", Role.ATTN_Q, "self_attn.q_proj", into),
        *linear(number, "attn_k", Role.ATTN_K, "self_attn.k_proj", into),
        *linear(number, "attn_v", Role.ATTN_V, "self_attn.v_proj", into),
        norm(number, "attn_q_norm", "self_attn.q_layernorm"),
        norm(number, "attn_k_norm", "self_attn.k_layernorm"),
        *linear(number, "attn_out", Role.ATTN_OUT, "self_attn.out_proj", out, adds=True),
    )


def _convolution(number: int) -> tuple[Slot, ...]:
    """Two projections, and between them a kernel of its own for every channel: [h, 1, K] as stored."""
    into = seen(number, "conv.input", "conv.in_proj")
    out = seen(number, "conv.output", "conv.out_proj")
    kernel = f"model.layers.{number}.conv.conv.weight"
    return (
        *linear(number, "conv.in", Role.SSM_IN, "conv.in_proj", into),
        Slot(f"layers.{number}.conv", Role.CONV, kernel, ops=(Squeezed(-2),)),
        *linear(number, "conv.out", Role.SSM_OUT, "conv.out_proj", out, adds=True),
    )


def ends(config: Config) -> tuple[Slot, ...]:
    """The final norm is called after embeddings."""
    return named_ends(config, "model.embedding_norm")


LFM2_MOE = Family(
    name="lfm2_moe",
    classes=("Lfm2MoeForCausalLM",),
    model_type="lfm2_moe",
    shape=moe_shape,
    layer=layer,
    ends=ends,
    known=SHAPE_KEYS
    | {
        "num_experts",
        "num_experts_per_tok",
        "num_dense_layers",
        "moe_intermediate_size",
        "norm_topk_prob",
        "routed_scaling_factor",
        "norm_eps",
        "conv_L_cache",
        "tie_embedding",
        "full_attn_idxs",  # layer_types says it
    },
    says={"use_pos_enc": (True,)},
)
