"""Kimi-Linear: delta attention in most layers, latent attention without rotation in the others; dense layers
first, DeepSeek-V3's router, shared experts."""

from __future__ import annotations

from moequant.families.base import Config, Family, Slot
from moequant.families.blocks import (
    SHAPE_KEYS,
    Experts,
    correction,
    ends,
    gated_ffn,
    moe_shape,
    released,
    router,
)
from moequant.families.deepseek_v3 import ROUTING_KEYS
from moequant.families.kda import KDA_KEYS, LINEAR, delta_attention
from moequant.families.mla import LATENT_KEYS, latent_attention
from moequant.values.ops import Squeezed

STORED = "block_sparse_moe"
"""What checkpoints call the module that transformers calls `mlp`."""

FLAT = (Squeezed(-1), Squeezed(-2), Squeezed(-2))
"""Decay rates [1, 1, H, 1] as a vector."""


def layer(config: Config, number: int) -> tuple[Slot, ...]:
    """One decoder layer."""
    width = int(config.linear_num_heads * config.linear_head_dim)
    mixer = (
        delta_attention(number, width, FLAT, narrow=True)
        if config.layer_types[number] == LINEAR
        else latent_attention(config, number)
    )
    if config.mlp_layer_types[number] != "sparse":
        return (*mixer, *released(gated_ffn(number), ".mlp.", f".{STORED}."))
    experts = Experts(config.moe_intermediate_size, f"{STORED}.experts", ("w1", "w3", "w2"))
    shared = gated_ffn(number, "mlp.shared_experts", "shared")
    return (
        *mixer,
        router(number, f"{STORED}.gate"),
        correction(number, stored=f"{STORED}.gate.e_score_correction_bias"),
        *experts.slots(number),
        *released(shared, ".mlp.", f".{STORED}."),
    )


KIMI_LINEAR = Family(
    name="kimi_linear",
    classes=("KimiLinearForCausalLM",),
    model_type="kimi_linear",
    shape=moe_shape,
    layer=layer,
    ends=ends,
    known=SHAPE_KEYS
    | LATENT_KEYS
    | ROUTING_KEYS
    | KDA_KEYS
    | {
        "first_k_dense_replace",
        "linear_attn_config",
        "mlp_layer_types",
        "model_max_length",
        "moe_renormalize",
        "num_expert_group",
        "num_experts",
        "num_experts_per_token",
        "num_shared_experts",
    },
    says={
        "mla_use_nope": (True,),
        "moe_layer_freq": (1,),
        "moe_router_activation_func": ("sigmoid",),
        "use_grouped_topk": (True,),
    },
)
