"""AFMoE (Trinity): norms in front of and behind every block, gated attention, windows in most layers, which
alone are rotated; dense layers first, a sigmoid router whose correction only chooses, shared experts."""

from __future__ import annotations

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
    norm,
    router,
    seen,
)
from moequant.values import Role


def layer(config: Config, number: int) -> tuple[Slot, ...]:
    """One decoder layer: nothing is added to the stream but through a norm."""
    into = seen(number, "attn.input", "self_attn.q_proj")
    heads = (
        *attention(number, qk_norm=True, biased=True, ffn_norm="pre_mlp_layernorm", adds=False),
        *linear(number, "attn_gate", Role.ATTN_GATE, "self_attn.gate_proj", into),
        norm(number, "attn_post_norm", "post_attention_layernorm"),
        norm(number, "ffn_post_norm", "post_mlp_layernorm"),
    )
    if number < config.num_dense_layers:
        return (*heads, *gated_ffn(number, adds=False))
    shared = gated_ffn(number, "mlp.shared_experts", "shared") if config.num_shared_experts else ()
    return (
        *heads,
        router(number, "mlp.router.gate", "mlp.router.gate"),
        correction(number, "mlp.expert_bias"),
        *Experts(config.moe_intermediate_size).slots(number, adds=False),
        *shared,
    )


AFMOE = Family(
    name="afmoe",
    classes=("AfmoeForCausalLM",),
    model_type="afmoe",
    shape=moe_shape,
    layer=layer,
    ends=ends,
    known=SHAPE_KEYS
    | {
        "num_experts",
        "num_experts_per_tok",
        "num_shared_experts",
        "num_dense_layers",
        "moe_intermediate_size",
        "route_scale",
        "mup_enabled",
        "global_attn_every_n_layers",
        "load_balance_coeff",
        "use_grouped_mm",
    },
    says={
        "score_func": ("sigmoid",),
        "route_norm": (True,),
        "n_group": (1,),
        "topk_group": (1,),
        "num_expert_groups": (1,),
        "num_limited_groups": (1,),
    },
)
