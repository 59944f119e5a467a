"""Ling 3 (Bailing): delta attention whose decay has a bound in most layers, latent attention with a gate for
every head in the others; dense layers first, DeepSeek-V3's router, shared experts."""

from __future__ import annotations

from moequant.families.base import Config, Family, Slot
from moequant.families.blocks import (
    SHAPE_KEYS,
    correction,
    ends,
    gated_ffn,
    linear,
    moe_shape,
    released,
    seen,
)
from moequant.families.deepseek_v3 import ROUTING_KEYS, prediction_layers, sparse_ffn
from moequant.families.kda import KDA_KEYS, LINEAR, delta_attention
from moequant.families.mla import LATENT_KEYS, latent_attention
from moequant.families.predictions import APPENDED, appended
from moequant.values import Role


def layer(config: Config, number: int) -> tuple[Slot, ...]:
    """One decoder layer."""
    mixer = (
        delta_attention(number, int(config.linear_num_heads * config.linear_head_dim))
        if config.layer_types[number] == LINEAR
        else _gated_attention(config, number)
    )
    own = released(released(mixer, ".o_proj.", ".dense."), ".self_attn.", ".attention.")
    if config.mlp_layer_types[number] != "sparse":
        return (*own, *gated_ffn(number))
    chooses = correction(number, stored="mlp.gate.expert_bias")
    sparse = (chooses if slot.role is Role.CORRECTION else slot for slot in sparse_ffn(config, number))
    return (*own, *sparse)


def _gated_attention(config: Config, number: int) -> tuple[Slot, ...]:
    into = seen(number, "attn.input", "self_attn.kv_a_proj_with_mqa")
    gate = linear(number, "attn_gate", Role.ATTN_GATE, "self_attn.g_proj", into)
    return (*latent_attention(config, number), *gate)


def predictions(config: Config) -> tuple[tuple[Slot, ...], ...]:
    """Layers of latent attention and experts."""
    layers = enumerate(zip(config.layer_types, config.mlp_layer_types, strict=True))
    alike = [number for number, (kind, block) in layers if kind != LINEAR and block == "sparse"]
    names = {**APPENDED, "norm": "final_layernorm"}
    return appended(config, layer, names, twin=alike[-1]) if alike else ()


BAILING_HYBRID = Family(
    name="bailing_hybrid",
    classes=("BailingMoeV3ForCausalLM", "BailingHybridForCausalLM"),
    model_type="bailing_hybrid",
    shape=moe_shape,
    layer=layer,
    ends=ends,
    known=SHAPE_KEYS
    | LATENT_KEYS
    | ROUTING_KEYS
    | KDA_KEYS
    | {
        "first_k_dense_replace",
        "kda_lower_bound",
        "kda_safe_gate",
        "layer_group_size",
        "mlp_layer_types",
        "model_max_length",
        "moe_renormalize",
        "moe_shared_expert_intermediate_size",  # The widths of stored tensors say it.
        "mtp_loss_scaling_factor",
        "num_expert_group",
        "num_experts",
        "num_experts_per_token",
        "num_shared_experts",
        "rotary_dim",
        "short_conv_kernel_size",
    },
    # What releases say, of this model and of others that they once were, and the class computes anyway.
    says={
        "expert_swiglu_limit_list": (0, None),
        "gated_attention_proj_granularity_type": ("head_wise",),
        "group_norm_size": (1,),
        "linear_attention": ("kda",),
        "linear_silu": (True,),
        "moe_router_enable_expert_bias": (True,),
        "no_kda_lora": (True,),
        "rope_interleave": (True,),
        "router_dtype": ("fp32",),
        "scale_router_input": (False,),
        "score_function": ("sigmoid",),
        "scoring_func": ("sigmoid",),
        "share_expert_swiglu_limit_list": (0, None),
        "topk_method": ("noaux_tc",),
        "up_proj_norm": (False,),
        "use_bias": (False,),
        "use_kda_lora": (False,),
        "use_mla_nope": (False,),
        "use_nGPT": (False,),
        "use_qk_norm": (True,),
        "use_qkv_bias": (False,),
        "use_rmsnorm": (True,),
        "value_norm": (False,),
    },
    skipped=prediction_layers,
    predictions=predictions,
    renamed=(("model.word_embeddings.", "model.embed_tokens."),),
)
