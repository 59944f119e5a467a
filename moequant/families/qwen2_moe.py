"""Qwen2-MoE and Qwen1.5-MoE: biases on q, k and v, one shared expert behind a gate of its own."""

from __future__ import annotations

from moequant.families.base import Config, Family, Slot
from moequant.families.blocks import (
    SHAPE_KEYS,
    Experts,
    attention,
    ends,
    gated_ffn,
    moe_shape,
    router,
    shared_expert,
)
from moequant.families.qwen3_moe import ROUTING_KEYS, is_sparse


def layer(config: Config, number: int) -> tuple[Slot, ...]:
    """One decoder layer."""
    heads = attention(number, biased=True)
    if not is_sparse(config, number):
        return (*heads, *gated_ffn(number))
    experts = Experts(config.moe_intermediate_size).slots(number)
    return (*heads, router(number), *experts, *shared_expert(number))


QWEN2_MOE = Family(
    name="qwen2_moe",
    classes=("Qwen2MoeForCausalLM",),
    model_type="qwen2_moe",
    shape=moe_shape,
    layer=layer,
    ends=ends,
    known=SHAPE_KEYS
    | ROUTING_KEYS
    | {"shared_expert_intermediate_size", "use_sliding_window", "max_window_layers", "qkv_bias"},
)
