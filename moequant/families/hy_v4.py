"""Hy4: DeepSeek-V3.2's attention with a gate and sinks, GLM-5's shared choice of tokens, clamped experts, a
dense layer first. Layers read one hidden state out of several streams and add what they give to all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from moequant.families.base import PREDICTION, Config, Family, Get, Slot
from moequant.families.blocks import (
    SHAPE_KEYS,
    Experts,
    correction,
    gated_ffn,
    linear,
    moe_shape,
    released,
    router,
    seen,
)
from moequant.families.blocks import ends as plain_ends
from moequant.families.deepseek_v3 import ROUTING_KEYS
from moequant.families.deepseek_v32 import chosen, indexer
from moequant.families.mla import LATENT_KEYS, latent_attention
from moequant.values import ModelShape, Role

CONNECTION = ("fn", "base", "scale")
"""What reads from the streams and weighs what is added to them."""


def shape(config: Config) -> ModelShape:
    """The shape of the model."""
    return replace(moe_shape(config), streams=int(config.hc_mult))


def layer(config: Config, number: int) -> tuple[Slot, ...]:
    """One decoder layer. Nothing is added to a stream as it is."""
    slots = (
        *_connection(number, "attn", "attn"),
        *latent_attention(config, number),
        *_gate(number),
        *(indexer(number) if config.indexer_types[number] == "full" else ()),
        *_connection(number, "ffn", "mlp"),
        *_ffn(config, number),
    )
    return tuple(replace(slot, adds=False) for slot in slots)


def _ffn(config: Config, number: int) -> tuple[Slot, ...]:
    if config.mlp_layer_types[number] != "sparse":
        return _as_saved(gated_ffn(number))
    experts = Experts(config.moe_intermediate_size, "")
    shared = _as_saved(gated_ffn(number, "mlp.shared_experts", "shared"))
    return (router(number), correction(number), *experts.slots(number), *shared)


def _as_saved(slots: tuple[Slot, ...]) -> tuple[Slot, ...]:
    """Also under the names that transformers 5.24 saves: it gives every gate that of attention's."""
    return released(slots, ".gate_proj.", ".linear_gate.")


def _gate(number: int) -> tuple[Slot, ...]:
    """What attention gives is gated, number by number; some of its weight goes nowhere."""
    into = seen(number, "attn.input", "self_attn.kv_a_proj_with_mqa")
    gate = linear(number, "attn_gate", Role.ATTN_GATE, "self_attn.gate_proj", into)
    at = f"model.layers.{number}.self_attn"
    ways = (Get(f"{at}.learnable_sink_param"), Get(f"{at}.sinks"))
    sinks = Slot(f"layers.{number}.attn_sinks", Role.SINKS, f"{at}.sinks", ways)
    return (*_as_saved(gate), sinks)


def _connection(number: int, kind: str, stored: str) -> tuple[Slot, ...]:
    """Read under the release's names, under what transformers 5.24 makes of them in saving, and its own."""
    own, at = f"layers.{number}.hc_{kind}", f"model.layers.{number}"
    return tuple(
        Slot(
            f"{own}_{name}",
            Role.STREAMS,
            f"{at}.{kind}_hc.{name}",
            (
                Get(f"{at}.hc_{stored}_layer.hc_pre.hc_{name}"),
                Get(f"{at}.hc_pre.hc_{stored}_layer.hc_{name}"),
                Get(f"{at}.{kind}_hc.{name}"),
            ),
        )
        for name in CONNECTION
    )


def ends(config: Config) -> tuple[Slot, ...]:
    """What makes one hidden state of the streams stands before the final norm."""
    own = "model.hc_head.hc_"
    stored = ("model.hc_head.hc_head_", "model.hc_pre.hc_head.hc_head_", own)
    head = (
        Slot(f"hc_{name}", Role.STREAMS, f"{own}{name}", tuple(Get(f"{at}{name}") for at in stored))
        for name in CONNECTION
    )
    return (*plain_ends(config), *head)


def prediction_layers(config: Config) -> Mapping[str, str]:
    """What releases may hold beside the layers that transformers runs."""
    return {r"model\.mtp_layers\..*": PREDICTION}


HY_V4 = Family(
    name="hy_v4",
    classes=("HYV4ForCausalLM",),
    model_type="hy_v4",
    shape=shape,
    layer=layer,
    ends=ends,
    known=SHAPE_KEYS
    | LATENT_KEYS
    | ROUTING_KEYS
    | {
        "hc_eps",
        "hc_magnitude",
        "hc_mult",
        "index_head_dim",
        "index_n_heads",
        "index_topk",
        "indexer_types",
        "learnable_sink_init",
        "mlp_layer_types",
        "swiglu_limit",
        "enable_lm_head_fp32",  # here, all sums are taken in float32
    },
    says={
        "first_k_dense_replace": (1,),
        "rope_interleave": (False,),
        "scoring_func": ("sigmoid",),
        "topk_method": ("noaux_tc",),
    },
    skipped=prediction_layers,
    attention_gives=3,
    chosen=chosen,
)
