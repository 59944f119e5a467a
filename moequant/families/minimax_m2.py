"""MiniMax-M2: q and k normed across all heads, part of each head rotated, a sigmoid router whose correction
only chooses."""

from __future__ import annotations

from collections.abc import Mapping

from moequant.families.base import PREDICTION, Config, Family, Slot
from moequant.families.blocks import SHAPE_KEYS, Experts, attention, correction, ends, moe_shape, router

STORED = "block_sparse_moe"
"""What checkpoints call the module that transformers calls `mlp`."""


def layer(config: Config, number: int) -> tuple[Slot, ...]:
    """One decoder layer."""
    experts = Experts(config.intermediate_size, f"{STORED}.experts", ("w1", "w3", "w2"))
    return (
        *attention(number, qk_norm=True),
        router(number, f"{STORED}.gate"),
        correction(number, "mlp.e_score_correction_bias", f"{STORED}.e_score_correction_bias"),
        *experts.slots(number),
    )


def prediction_layers(config: Config) -> Mapping[str, str]:
    """What releases may hold beside the layers that transformers runs."""
    return {r"model\.mtp\..*": PREDICTION}


MINIMAX_M2 = Family(
    name="minimax_m2",
    classes=("MiniMaxM2ForCausalLM",),
    model_type="minimax_m2",
    shape=moe_shape,
    layer=layer,
    ends=ends,
    known=SHAPE_KEYS
    | {
        "num_local_experts",
        "num_experts",
        "num_experts_per_tok",
        "rotary_dim",
        "partial_rotary_factor",
        "num_mtp_modules",
        "mtp_transformer_layers",
        "use_mtp",
        "mlp_intermediate_size",
    },
    says={
        "scoring_func": ("sigmoid",),
        "use_routing_bias": (True,),
        "use_qk_norm": (True,),
        "qk_norm_type": ("per_layer",),
        "shared_intermediate_size": (0,),
        "shared_moe_mode": ("sigmoid",),
        "attn_type_list": (1,),
        "layernorm_full_attention_beta": (1.0,),
        "layernorm_linear_attention_beta": (1.0,),
        "layernorm_mlp_beta": (1.0,),
    },
    skipped=prediction_layers,
)
