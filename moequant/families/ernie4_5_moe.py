"""ERNIE-4.5: dense layers first, a softmax router whose correction only chooses, shared experts."""

from __future__ import annotations

from collections.abc import Mapping

from moequant.families.base import PREDICTION, Config, Family, Slot
from moequant.families.blocks import (
    SHAPE_KEYS,
    Experts,
    attention,
    correction,
    ends,
    gated_ffn,
    moe_shape,
    router,
)
from moequant.values.ops import Squeezed


def is_sparse(config: Config, number: int) -> bool:
    """Whether a layer has experts."""
    inside = config.moe_layer_start_index <= number <= config.moe_layer_end_index
    return bool(inside and (number + 1) % config.moe_layer_interval == 0)


def layer(config: Config, number: int) -> tuple[Slot, ...]:
    """One decoder layer. The correction is stored as one row."""
    if not is_sparse(config, number):
        return (*attention(number), *gated_ffn(number))
    statics = "moe_statics.e_score_correction_bias"
    shared = gated_ffn(number, "mlp.shared_experts", "shared") if config.moe_num_shared_experts else ()
    return (
        *attention(number),
        router(number),
        correction(number, f"mlp.gate.{statics}", f"mlp.{statics}", (Squeezed(-2),)),
        *Experts(config.moe_intermediate_size).slots(number),
        *shared,
    )


def prediction_layers(config: Config) -> Mapping[str, str]:
    """What releases may hold beside the layers that transformers runs."""
    return {r"model\.mtp_.*": PREDICTION}


ERNIE4_5_MOE = Family(
    name="ernie4_5_moe",
    classes=("Ernie4_5_MoeForCausalLM",),
    model_type="ernie4_5_moe",
    shape=moe_shape,
    layer=layer,
    ends=ends,
    known=SHAPE_KEYS
    | {
        "num_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "moe_num_shared_experts",
        "moe_layer_start_index",
        "moe_layer_end_index",
        "moe_layer_interval",
        "moe_capacity",  # of training
        "num_nextn_predict_layers",
    },
    says={"moe_use_aux_free": (True,), "moe_gate": ("topk", "top2_fused")},
    skipped=prediction_layers,
)
