"""Cohere2-MoE: attention and feed-forward block side by side behind one norm, windows in most layers, which
alone are rotated; dense layers first, shared experts averaged with the routed ones."""

from __future__ import annotations

from functools import partial

from moequant.families.base import Config, Family, Slot
from moequant.families.blocks import SHAPE_KEYS, Experts, attention, ends, gated_ffn, moe_shape, router
from moequant.families.deepseek_v3 import prediction_layers
from moequant.families.predictions import appended


def layer(config: Config, number: int) -> tuple[Slot, ...]:
    """One decoder layer. Attention alone pulls the residual's error back: both blocks would do it twice."""
    heads = attention(number, biased=True, ffn_norm=None)
    if config.mlp_layer_types[number] == "dense":
        return (*heads, *gated_ffn(number, adds=False))
    shared = gated_ffn(number, "mlp.shared_experts", "shared") if config.num_shared_experts else ()
    return (
        *heads,
        router(number),
        *Experts(config.intermediate_size).slots(number, adds=False),
        *shared,
    )


COHERE2_MOE = Family(
    name="cohere2_moe",
    classes=("Cohere2MoeForCausalLM",),
    model_type="cohere2_moe",
    shape=moe_shape,
    layer=layer,
    ends=ends,
    known=SHAPE_KEYS
    | {
        "num_experts",
        "num_experts_per_tok",
        "num_shared_experts",
        "shared_expert_combination_strategy",
        "expert_selection_fn",
        "norm_topk_prob",
        "logit_scale",
        "layer_norm_eps",
        "mlp_layer_types",
        "first_k_dense_replace",
        "prefix_dense_intermediate_size",
        "prefix_dense_sliding_window_pattern",
        "sliding_window_pattern",
        "num_nextn_predict_layers",
    },
    says={"use_qk_norm": (False,), "use_parallel_block": (True,), "use_gated_activation": (True,)},
    skipped=prediction_layers,
    predictions=partial(appended, layer=layer),
)
