"""K-EXAONE: windows in most layers, which alone are rotated; dense layers first, then DeepSeek-V3's
router."""

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
from moequant.families.deepseek_v3 import ROUTER_SAYS, ROUTING_KEYS


def layer(config: Config, number: int) -> tuple[Slot, ...]:
    """One decoder layer."""
    heads = attention(number, qk_norm=True)
    if config.mlp_layer_types[number] != "sparse":
        return (*heads, *gated_ffn(number))
    return (
        *heads,
        router(number),
        correction(number, stored="mlp.e_score_correction_bias"),
        *Experts(config.moe_intermediate_size).slots(number),
        *gated_ffn(number, "mlp.shared_experts", "shared"),
    )


def prediction_layers(config: Config) -> Mapping[str, str]:
    """What releases may hold beside the layers that transformers runs."""
    return {r"mtp\..*": PREDICTION}


EXAONE_MOE = Family(
    name="exaone_moe",
    classes=("ExaoneMoeForCausalLM", "ExaoneMoEForCausalLM"),
    model_type="exaone_moe",
    shape=moe_shape,
    layer=layer,
    ends=ends,
    known=SHAPE_KEYS
    | ROUTING_KEYS
    | {
        "num_experts",
        "num_shared_experts",
        "first_k_dense_replace",
        "mlp_layer_types",
        "is_moe_layer",
        "sliding_window_pattern",
    },
    says={**ROUTER_SAYS, "first_last_k_dense_replace": (1,)},
    skipped=prediction_layers,
)
