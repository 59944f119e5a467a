"""Laguna: windows and another number of heads in most layers, attention gated by softplus; dense layers
first, a sigmoid router whose correction only chooses, a shared expert."""

from __future__ import annotations

from typing import Any

from moequant.errors import FamilyError
from moequant.families.base import Config, Family, Slot
from moequant.families.blocks import (
    SHAPE_KEYS,
    Experts,
    attention,
    correction,
    ends,
    gated_ffn,
    linear,
    moe_shape,
    released,
    router,
    seen,
)
from moequant.values import Role


def layer(config: Config, number: int) -> tuple[Slot, ...]:
    """One decoder layer. A multiplier stands behind the routed experts' sum."""
    into = seen(number, "attn.input", "self_attn.q_proj")
    heads = (
        *attention(number, qk_norm=True, biased=True),
        *linear(number, "attn_gate", Role.ATTN_GATE, "self_attn.g_proj", into),
    )
    if config.mlp_layer_types[number] != "sparse":
        return (*heads, *gated_ffn(number))
    shared = gated_ffn(number, "mlp.shared_experts", "shared")
    return (
        *heads,
        router(number),
        correction(number, stored="mlp.experts.e_score_correction_bias"),
        *Experts(config.moe_intermediate_size).slots(number, adds=config.moe_routed_scaling_factor == 1),
        *released(shared, ".shared_experts.", ".shared_expert."),
    )


def _read(raw: dict[str, Any]) -> dict[str, Any]:
    """Some releases say also as Qwen does which layers are dense. FamilyError when they contradict."""
    if raw.get("mlp_only_layers") is None and raw.get("decoder_sparse_step") is None:
        return raw
    dense, step = raw.get("mlp_only_layers") or (), raw.get("decoder_sparse_step") or 1
    layers = range(raw["num_hidden_layers"])
    kinds = ["dense" if number in dense or (number + 1) % step else "sparse" for number in layers]
    told = raw.get("mlp_layer_types") or kinds
    if told != kinds:
        raise FamilyError(
            f"laguna: config key mlp_only_layers = {list(dense)}, decoder_sparse_step = {step}: "
            "mlp_layer_types says of other layers that they are dense"
        )
    left = {key: value for key, value in raw.items() if key not in ("mlp_only_layers", "decoder_sparse_step")}
    return {**left, "mlp_layer_types": kinds}


LAGUNA = Family(
    name="laguna",
    classes=("LagunaForCausalLM",),
    model_type="laguna",
    shape=moe_shape,
    layer=layer,
    ends=ends,
    known=SHAPE_KEYS
    | {
        "num_experts",
        "num_experts_per_tok",
        "num_attention_heads_per_layer",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
        "moe_routed_scaling_factor",
        "mlp_layer_types",
        "gating",
        "partial_rotary_factor",  # Where rope_parameters leave it out.
        "gating_types",  # The width of the stored tensor says it.
    },
    says={
        "norm_topk_prob": (True,),
        "moe_router_use_sigmoid": (True,),
        "moe_apply_router_weight_on_input": (False,),
        "use_bidirectional_attention": (False,),
    },
    dialect=_read,
)
