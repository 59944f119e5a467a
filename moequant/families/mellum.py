"""Mellum 2: Qwen3-MoE with windows in most layers, and rotary positions of their own for those."""

from __future__ import annotations

from collections.abc import Mapping

from moequant.families.base import PREDICTION, Config, Family, Slot
from moequant.families.blocks import SHAPE_KEYS, Experts, attention, ends, gated_ffn, moe_shape, router


def layer(config: Config, number: int) -> tuple[Slot, ...]:
    """One decoder layer."""
    heads = attention(number, qk_norm=True, biased=True)
    if config.mlp_layer_types[number] != "sparse":
        return (*heads, *gated_ffn(number))
    return (*heads, router(number), *Experts(config.moe_intermediate_size).slots(number))


def prediction_layers(config: Config) -> Mapping[str, str]:
    """What releases may hold beside the layers that transformers runs."""
    return {r"(model\.)?mtp\..*": PREDICTION}


MELLUM = Family(
    name="mellum",
    classes=("MellumForCausalLM",),
    model_type="mellum",
    shape=moe_shape,
    layer=layer,
    ends=ends,
    known=SHAPE_KEYS
    | {
        "num_experts",
        "num_local_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "mlp_layer_types",
        "norm_topk_prob",
        "num_mtp_layers",
        "num_nextn_predict_layers",
        "mtp_layer_types",
        "mtp_mlp_layer_types",
    },
    skipped=prediction_layers,
)
