"""Qwen3.5- and Qwen3.6-MoE: Qwen3-Next with separate projections; the text part of checkpoints that see."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from moequant.families.base import Config, Family, Slot
from moequant.families.blocks import SHAPE_KEYS, Experts, attention, ends, moe_shape, router, shared_expert
from moequant.families.delta_net import DELTA_KEYS, DELTA_SAYS, LINEAR, MTP, delta_net, full_attention_beside
from moequant.families.qwen3_vl_moe import VISION
from moequant.values import Role

PROJECTIONS = {
    "ssm.qkv": ("in_proj_qkv", Role.ATTN_QKV),
    "ssm.gate": ("in_proj_z", Role.ATTN_GATE),
    "ssm.beta": ("in_proj_b", Role.SSM_IN),
    "ssm.alpha": ("in_proj_a", Role.SSM_IN),
}


def layer(config: Config, number: int) -> tuple[Slot, ...]:
    """One decoder layer."""
    is_linear = config.layer_types[number] == LINEAR
    mixer = delta_net(number, PROJECTIONS) if is_linear else attention(number, qk_norm=True, biased=True)
    experts = Experts(config.moe_intermediate_size).slots(number)
    return (*mixer, router(number), *experts, *shared_expert(number))


def skipped(config: Config) -> Mapping[str, str]:
    """What is left out."""
    return {**MTP, **VISION}


QWEN3_5_MOE = Family(
    name="qwen3_5_moe",
    classes=("Qwen3_5MoeForConditionalGeneration", "Qwen3_5MoeForCausalLM"),
    model_type="qwen3_5_moe_text",
    shape=moe_shape,
    layer=layer,
    ends=ends,
    known=SHAPE_KEYS | DELTA_KEYS | {"num_experts", "num_experts_per_tok", "moe_intermediate_size"},
    says=DELTA_SAYS
    | {
        "norm_topk_prob": (True,),
        "mlp_only_layers": ([],),
        "decoder_sparse_step": (1,),
        "use_sliding_window": (False,),
    },
    skipped=skipped,
    predictions=partial(full_attention_beside, layer=layer),
    renamed=(("model.language_model.", "model."), ("model.mtp.", "mtp.")),
)
