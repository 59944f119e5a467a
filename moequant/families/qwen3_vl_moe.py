"""Qwen3-VL-MoE, its text part: Qwen3-MoE with experts that releases keep transposed."""

from __future__ import annotations

from collections.abc import Mapping

from moequant.families.base import Config, Family, Slot
from moequant.families.blocks import SHAPE_KEYS, Experts, attention, ends, gated_ffn, moe_shape, router
from moequant.families.qwen3_moe import ROUTING_KEYS, is_sparse

VISION = {r"model\.visual\..*": "vision"}
"""Tensors of Qwen's vision towers."""


def layer(config: Config, number: int) -> tuple[Slot, ...]:
    """One decoder layer."""
    heads = attention(number, qk_norm=True, biased=config.attention_bias)
    if not is_sparse(config, number):
        return (*heads, *gated_ffn(number))
    experts = Experts(config.moe_intermediate_size, transposed_for=config.hidden_size)
    return (*heads, router(number), *experts.slots(number))


def skipped(config: Config) -> Mapping[str, str]:
    """What is left out."""
    return VISION


QWEN3_VL_MOE = Family(
    name="qwen3_vl_moe",
    classes=("Qwen3VLMoeForConditionalGeneration",),
    model_type="qwen3_vl_moe_text",
    shape=moe_shape,
    layer=layer,
    ends=ends,
    known=SHAPE_KEYS | (ROUTING_KEYS - {"norm_topk_prob"}) | {"deepstack_visual_indexes"},
    says={"norm_topk_prob": (True,)},
    skipped=skipped,
    renamed=(("model.language_model.", "model."),),
    hoisted=(("vision_config", "deepstack_visual_indexes"),),
)
