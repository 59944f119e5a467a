"""MiMo-V2-Flash: values narrower than keys; sinks and twice the key heads in layers with a window;
dense layers first, then DeepSeek-V3's router without shared experts."""

from __future__ import annotations

from collections.abc import Mapping

from moequant.families.base import PREDICTION, Config, Family, Get, Slot
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
from moequant.values import Role


def has_window(config: Config, number: int) -> bool:
    """Whether a layer looks back only so far."""
    return bool(config.layer_types[number] == "sliding_attention")


def layer(config: Config, number: int) -> tuple[Slot, ...]:
    """One decoder layer."""
    heads = attention(number, biased=True)
    if has_window(config, number):
        at = f"model.layers.{number}.self_attn"
        ways = (Get(f"{at}.attention_sink_bias"), Get(f"{at}.sinks"))
        heads = (*heads, Slot(f"layers.{number}.attn_sinks", Role.SINKS, f"{at}.sinks", ways))
    if config.mlp_layer_types[number] != "sparse":
        return (*heads, *gated_ffn(number))
    experts = Experts(config.moe_intermediate_size).slots(number)
    return (*heads, router(number), correction(number), *experts)


def prediction_layers(config: Config) -> Mapping[str, str]:
    """What releases may hold beside the layers that transformers runs."""
    return {r"model\.mtp\..*": PREDICTION}


MIMO_V2_FLASH = Family(
    name="mimo_v2_flash",
    classes=("MiMoV2FlashForCausalLM",),
    model_type="mimo_v2_flash",
    shape=moe_shape,
    layer=layer,
    ends=ends,
    known=(SHAPE_KEYS - {"rope_theta"})
    | ROUTING_KEYS
    | {
        "v_head_dim",
        "mlp_layer_types",
        "attention_value_scale",
        "sliding_window_size",
        "attention_chunk_size",
        # The stored tensors say which layers have a window, how many heads and which width; the class makes
        # the model that the release has, or their shapes do not go.
        "hybrid_layer_pattern",
        "hybrid_block_size",
        "moe_layer_freq",
        "swa_num_attention_heads",
        "swa_num_key_value_heads",
        "swa_head_dim",
        "swa_v_head_dim",
    },
    # The class reads rope_parameters; what releases say beside them are its defaults.
    says={
        **{key: told for key, told in ROUTER_SAYS.items() if key != "moe_layer_freq"},
        "rope_theta": (5_000_000,),
        "swa_rope_theta": (10_000,),
        "partial_rotary_factor": (0.334,),
        "layernorm_epsilon": (1e-5,),
        "add_full_attention_sink_bias": (False,),
        "add_swa_attention_sink_bias": (True,),
    },
    skipped=prediction_layers,
)
