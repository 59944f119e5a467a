"""DeepSeek-V2 and V2-Lite: latent attention, dense layers first, a softmax router, shared experts."""

from __future__ import annotations

from moequant.families.base import Config, Family, Slot
from moequant.families.blocks import SHAPE_KEYS, Experts, ends, gated_ffn, moe_shape, router
from moequant.families.deepseek_v3 import ROUTING_KEYS, prediction_layers
from moequant.families.mla import LATENT_KEYS, latent_attention


def layer(config: Config, number: int) -> tuple[Slot, ...]:
    """One decoder layer."""
    attention = latent_attention(config, number)
    if number < config.first_k_dense_replace:
        return (*attention, *gated_ffn(number))
    shared = gated_ffn(number, "mlp.shared_experts", "shared")
    return (*attention, router(number), *Experts(config.moe_intermediate_size).slots(number), *shared)


DEEPSEEK_V2 = Family(
    name="deepseek_v2",
    classes=("DeepseekV2ForCausalLM",),
    model_type="deepseek_v2",
    shape=moe_shape,
    layer=layer,
    ends=ends,
    # The class never renormalises the chosen weights, whatever norm_topk_prob says.
    known=(SHAPE_KEYS | LATENT_KEYS | ROUTING_KEYS | {"first_k_dense_replace", "num_experts", "topk_method"})
    - {"norm_topk_prob"},
    says={"scoring_func": ("softmax",), "moe_layer_freq": (1,), "rope_interleave": (True,)},
    skipped=prediction_layers,
)
