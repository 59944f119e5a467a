"""Jamba: Mamba in most layers, attention without positions in the others, experts in every other one."""

from __future__ import annotations

from moequant.families.base import Config, Family, Slot
from moequant.families.blocks import SHAPE_KEYS, Experts, attention, gated_ffn, moe_shape, norm, router
from moequant.families.blocks import ends as named_ends
from moequant.families.mamba import mamba


def is_mamba(config: Config, number: int) -> bool:
    """Whether a layer has Mamba in place of attention."""
    return bool(config.layers_block_type[number] == "mamba")


def layer(config: Config, number: int) -> tuple[Slot, ...]:
    """One decoder layer."""
    at = "feed_forward"
    if is_mamba(config, number):
        front = (
            norm(number, "attn_norm", "input_layernorm"),
            *mamba(number, "mamba"),
            norm(number, "ffn_norm", "pre_ff_layernorm"),
        )
    else:
        front = attention(number, ffn_norm="pre_ff_layernorm")
    if config.layers_num_experts[number] == 1:
        return (*front, *gated_ffn(number, at))
    experts = Experts(config.intermediate_size, f"{at}.experts", module=f"{at}.experts")
    return (*front, router(number, f"{at}.router", f"{at}.router"), *experts.slots(number))


def ends(config: Config) -> tuple[Slot, ...]:
    """Embedding, final norm and head."""
    return named_ends(config, "model.final_layernorm")


JAMBA = Family(
    name="jamba",
    classes=("JambaForCausalLM",),
    model_type="jamba",
    shape=moe_shape,
    layer=layer,
    ends=ends,
    known=SHAPE_KEYS
    | {
        "num_experts",
        "num_local_experts",
        "num_experts_per_tok",
        "expert_layer_period",
        "expert_layer_offset",
        "attn_layer_period",
        "attn_layer_offset",
        "mamba_d_state",
        "mamba_d_conv",
        "mamba_expand",
        "mamba_dt_rank",
        "mamba_conv_bias",
        # How it is computed, not what.
        "use_mamba_kernels",
        "use_mambapy",
        "use_associative_scan",
        "num_logits_to_keep",
        "calc_logits_for_entire_prompt",
    },
    says={"mamba_inner_layernorms": (True,)},
)
