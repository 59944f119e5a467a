"""Qwen3-Next: three delta nets, then one layer of gated attention; experts beside a gated shared one."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

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
from moequant.families.delta_net import DELTA_KEYS, DELTA_SAYS, LINEAR, MTP, delta_net, full_attention_beside
from moequant.families.qwen3_moe import ROUTING_KEYS, is_sparse
from moequant.values import Role

PROJECTIONS = {"ssm.qkvz": ("in_proj_qkvz", Role.ATTN_QKV), "ssm.ba": ("in_proj_ba", Role.SSM_IN)}
"""Rows of both are by key head: its queries, keys, values and gates; its betas and alphas."""


def layer(config: Config, number: int) -> tuple[Slot, ...]:
    """One decoder layer."""
    is_linear = config.layer_types[number] == LINEAR
    mixer = delta_net(number, PROJECTIONS) if is_linear else attention(number, qk_norm=True, biased=True)
    if not is_sparse(config, number):
        return (*mixer, *gated_ffn(number))
    experts = Experts(config.moe_intermediate_size).slots(number)
    return (*mixer, router(number), *experts, *shared_expert(number))


def skipped(config: Config) -> Mapping[str, str]:
    """What is left out."""
    return MTP


QWEN3_NEXT = Family(
    name="qwen3_next",
    classes=("Qwen3NextForCausalLM",),
    model_type="qwen3_next",
    shape=moe_shape,
    layer=layer,
    ends=ends,
    known=SHAPE_KEYS | ROUTING_KEYS | DELTA_KEYS,
    says=DELTA_SAYS | {"use_sliding_window": (False,)},
    skipped=skipped,
    predictions=partial(full_attention_beside, layer=layer),
    renamed=(("model.mtp.", "mtp."),),
)
