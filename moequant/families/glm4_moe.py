"""GLM-4.5 to 4.7 and Air: llama-like attention with biases and part of each head rotated, dense layers first,
then DeepSeek-V3's router and shared experts. Solar-Open is the same without dense layers."""

from __future__ import annotations

from functools import partial

from moequant.families.base import Config, Family, Slot
from moequant.families.blocks import SHAPE_KEYS, attention, ends, gated_ffn, moe_shape, value
from moequant.families.deepseek_v3 import ROUTER_SAYS, ROUTING_KEYS, prediction_layers, sparse_ffn
from moequant.families.predictions import appended


def layer(config: Config, number: int) -> tuple[Slot, ...]:
    """One decoder layer."""
    heads = attention(number, qk_norm=bool(value(config, "use_qk_norm", False)), biased=True)
    if number < value(config, "first_k_dense_replace", 0):
        return (*heads, *gated_ffn(number))
    return (*heads, *sparse_ffn(config, number))


GLM4_MOE = Family(
    name="glm4_moe",
    classes=("Glm4MoeForCausalLM",),
    model_type="glm4_moe",
    shape=moe_shape,
    layer=layer,
    ends=ends,
    known=SHAPE_KEYS | ROUTING_KEYS | {"use_qk_norm", "first_k_dense_replace", "partial_rotary_factor"},
    says=ROUTER_SAYS,
    skipped=prediction_layers,
    predictions=partial(appended, layer=layer),
)

SOLAR_OPEN = Family(
    name="solar_open",
    classes=("SolarOpenForCausalLM",),
    model_type="solar_open",
    shape=moe_shape,
    layer=layer,
    ends=ends,
    known=SHAPE_KEYS | ROUTING_KEYS | {"partial_rotary_factor"},
    says={**ROUTER_SAYS, "first_k_dense_replace": (0,), "use_qk_norm": (False,)},
    skipped=prediction_layers,
)
