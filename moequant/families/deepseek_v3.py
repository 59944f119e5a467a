"""DeepSeek-V3 and R1: latent attention, dense layers first, a sigmoid router whose correction only chooses,
shared experts."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from moequant.families.base import PREDICTION, Config, Family, Slot
from moequant.families.blocks import SHAPE_KEYS, Experts, correction, ends, gated_ffn, moe_shape, router
from moequant.families.mla import LATENT_KEYS, latent_attention
from moequant.families.predictions import appended, count


def layer(config: Config, number: int) -> tuple[Slot, ...]:
    """One decoder layer."""
    dense = number < config.first_k_dense_replace
    return (
        *latent_attention(config, number),
        *(gated_ffn(number) if dense else sparse_ffn(config, number)),
    )


def sparse_ffn(config: Config, number: int) -> tuple[Slot, ...]:
    """Router, routed and shared experts of a layer."""
    shared = gated_ffn(number, "mlp.shared_experts", "shared")
    experts = Experts(config.moe_intermediate_size).slots(number)
    return (router(number), correction(number), *experts, *shared)


def prediction_layers(config: Config) -> Mapping[str, str]:
    """Stored tensors of layers behind the last."""
    first = config.num_hidden_layers
    numbers = "|".join(str(first + i) for i in range(count(config)))
    return {rf"model\.layers\.({numbers})\..*": PREDICTION} if numbers else {}


ROUTING_KEYS = frozenset(
    {
        "n_routed_experts",
        "num_local_experts",
        "num_experts_per_tok",
        "n_shared_experts",
        "moe_intermediate_size",
        "routed_scaling_factor",
        "norm_topk_prob",
        "n_group",
        "topk_group",
        "num_nextn_predict_layers",
        "num_mtp_layers",
        "ep_size",
        "seq_aux",
        "aux_loss_alpha",
    }
)
"""Config keys of a router that groups experts, with shared experts beside it."""

ROUTER_SAYS = {
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "moe_layer_freq": (1,),
    "moe_router_dtype": ("float32", "fp32"),
}
"""What releases say of that router, which the classes compute anyway."""

DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    classes=("DeepseekV3ForCausalLM",),
    model_type="deepseek_v3",
    shape=moe_shape,
    layer=layer,
    ends=ends,
    known=SHAPE_KEYS | LATENT_KEYS | ROUTING_KEYS | {"first_k_dense_replace"},
    says=ROUTER_SAYS,
    skipped=prediction_layers,
    predictions=partial(appended, layer=layer),
)
