"""Llama 4, alone or with a vision tower: one expert a token, fed the token scaled by the router's weight; a
shared expert; layers without experts between those with."""

from __future__ import annotations

from collections.abc import Mapping

from moequant.families.base import Config, Family, Get, Slot
from moequant.families.blocks import SHAPE_KEYS, attention, ends, gated_ffn, moe_shape, one_by_one
from moequant.values import Role, Site, Stack
from moequant.values.ops import Ops, Part, Transposed


def layer(config: Config, number: int) -> tuple[Slot, ...]:
    """One decoder layer."""
    heads = attention(number, biased=config.attention_bias)
    if number not in config.moe_layers:
        return (*heads, *gated_ffn(number, "feed_forward"))
    router = f"model.layers.{number}.feed_forward.router.weight"
    return (
        *heads,
        Slot(f"layers.{number}.router", Role.ROUTER, router),
        *_experts(config, number),
        *gated_ffn(number, "feed_forward.shared_expert", "shared"),
    )


def _experts(config: Config, number: int) -> tuple[Slot, ...]:
    """Gate, up and down, stored transposed: [E, h, 2f] and [E, f, h]."""
    at, width = f"model.layers.{number}.feed_forward.experts", int(config.intermediate_size)
    before = Site(f"layers.{number}.experts.input", at, "experts")
    inner = Site(f"layers.{number}.experts.inner", at, "inner")

    def slot(role: Role, param: str, rows: Ops, site: Site) -> Slot:
        name, param = f"layers.{number}.experts.{role.value}", f"{at}.{param}"
        ways = (Get(param, (Transposed(), *rows)), one_by_one(at, role))
        return Slot(name, role, param, ways, rows, site, Stack.EXPERTS, adds=role is Role.DOWN)

    return (
        slot(Role.GATE, "gate_up_proj", (Part(0, width),), before),
        slot(Role.UP, "gate_up_proj", (Part(width, 2 * width),), before),
        slot(Role.DOWN, "down_proj", (), inner),
    )


def vision(config: Config) -> Mapping[str, str]:
    """What only images cross."""
    return {r"(vision_model|multi_modal_projector)\..*": "vision: only text is converted"}


LLAMA4 = Family(
    name="llama4",
    classes=("Llama4ForCausalLM", "Llama4ForConditionalGeneration"),
    model_type="llama4_text",
    shape=moe_shape,
    layer=layer,
    ends=ends,
    known=SHAPE_KEYS
    | {
        "intermediate_size_mlp",
        "num_local_experts",
        "moe_layers",
        "interleave_moe_layer_step",
        "use_qk_norm",
        "no_rope_layers",
        "no_rope_layer_interval",
        "attention_chunk_size",
        "attn_temperature_tuning",
        "floor_scale",
        "attn_scale",
        "cache_implementation",
    },
    skipped=vision,
    renamed=(("language_model.", ""),),
)
