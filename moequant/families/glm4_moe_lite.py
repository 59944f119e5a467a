"""GLM-4.7-Flash: DeepSeek-V3's layers; the config lists which of them are dense."""

from __future__ import annotations

from functools import partial

from moequant.families.base import Config, Family, Slot
from moequant.families.blocks import SHAPE_KEYS, ends, gated_ffn, moe_shape
from moequant.families.deepseek_v3 import ROUTER_SAYS, ROUTING_KEYS, prediction_layers, sparse_ffn
from moequant.families.mla import LATENT_KEYS, latent_attention
from moequant.families.predictions import appended


def layer(config: Config, number: int) -> tuple[Slot, ...]:
    """One decoder layer."""
    dense = config.mlp_layer_types[number] != "sparse"
    return (
        *latent_attention(config, number),
        *(gated_ffn(number) if dense else sparse_ffn(config, number)),
    )


GLM4_MOE_LITE = Family(
    name="glm4_moe_lite",
    classes=("Glm4MoeLiteForCausalLM",),
    model_type="glm4_moe_lite",
    shape=moe_shape,
    layer=layer,
    ends=ends,
    known=SHAPE_KEYS | LATENT_KEYS | ROUTING_KEYS | {"mlp_layer_types", "partial_rotary_factor"},
    # The class reads mlp_layer_types, and without it takes one dense layer.
    says={**ROUTER_SAYS, "first_k_dense_replace": (1,)},
    skipped=prediction_layers,
    predictions=partial(appended, layer=layer),
)
