"""Hy3: q/k norms in every head, a dense layer first, a sigmoid router whose correction only chooses, shared
experts."""

from functools import partial

from moequant.families.base import Config, Family, Slot
from moequant.families.blocks import (
    SHAPE_KEYS,
    Experts,
    attention,
    correction,
    ends,
    gated_ffn,
    moe_shape,
    released,
    router,
)
from moequant.families.deepseek_v3 import prediction_layers
from moequant.families.predictions import APPENDED, appended

PARTS = {**APPENDED, "norm": "final_layernorm"}
"""What is around the layer that predicts."""


def layer(config: Config, number: int) -> tuple[Slot, ...]:
    """One decoder layer."""
    heads = attention(number, qk_norm=True, biased=True)
    if config.mlp_layer_types[number] != "sparse":
        return (*heads, *gated_ffn(number))
    shared = gated_ffn(number, "mlp.shared_experts", "shared")
    return (
        *heads,
        router(number, "mlp.router.gate"),
        correction(number, "mlp.e_score_correction_bias", "mlp.expert_bias"),
        *Experts(config.moe_intermediate_size).slots(number),
        *released(shared, ".shared_experts.", ".shared_mlp."),
    )


HY_V3 = Family(
    name="hy_v3",
    classes=("HYV3ForCausalLM",),
    model_type="hy_v3",
    shape=moe_shape,
    layer=layer,
    ends=ends,
    known=SHAPE_KEYS
    | {
        "num_experts",
        "num_experts_per_tok",
        "num_shared_experts",
        "moe_intermediate_size",
        "expert_hidden_dim",
        "mlp_layer_types",
        "router_scaling_factor",
        "num_nextn_predict_layers",
        # Where sums are taken in float32; here all are.
        "enable_moe_fp32_combine",
        "enable_attention_fp32_softmax",
        "enable_lm_head_fp32",
    },
    # The class reads mlp_layer_types, and without it takes one dense layer.
    says={
        "first_k_dense_replace": (1,),
        "route_norm": (True,),
        "qk_norm": (True,),
        "moe_router_use_sigmoid": (True,),
        "moe_router_enable_expert_bias": (True,),
    },
    skipped=prediction_layers,
    predictions=partial(appended, layer=layer, names=PARTS),
)
