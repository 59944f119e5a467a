"""gpt-oss: experts with biases, gate and up interleaved and, in bf16, transposed; sinks in attention."""

from __future__ import annotations

from moequant.families.base import Config, Family, Get, Slot
from moequant.families.blocks import SHAPE_KEYS, attention, bias, ends, moe_shape
from moequant.values import Role, Site, Stack
from moequant.values.ops import Ops, Part, Transposed


def layer(config: Config, number: int) -> tuple[Slot, ...]:
    """One decoder layer."""
    at = f"model.layers.{number}"
    own, routed = f"layers.{number}.router", f"{at}.mlp.router"
    return (
        *attention(number, biased=True),
        Slot(f"layers.{number}.attn_sinks", Role.SINKS, f"{at}.self_attn.sinks"),
        Slot(own, Role.ROUTER, f"{routed}.weight"),
        bias(own, routed),
        *_experts(config, number),
    )


def _experts(config: Config, number: int) -> tuple[Slot, ...]:
    """Gate, up and down; the release holds the first two as rows 0, 2, 4 … and 1, 3, 5 … of one tensor."""
    at = f"model.layers.{number}.mlp.experts"
    before = Site(f"layers.{number}.experts.input", at, "experts")
    inner = Site(f"layers.{number}.experts.inner", at, "inner")
    both = 2 * config.intermediate_size
    gate, up = Part(0, both, 2), Part(1, both, 2)
    return (
        _expert(number, Role.GATE, "gate_up_proj", (gate,), before),
        _bias(number, Role.GATE, "gate_up_proj", (Part(0, both, 2, axis=-1),)),
        _expert(number, Role.UP, "gate_up_proj", (up,), before),
        _bias(number, Role.UP, "gate_up_proj", (Part(1, both, 2, axis=-1),)),
        _expert(number, Role.DOWN, "down_proj", (), inner),
        _bias(number, Role.DOWN, "down_proj", ()),
    )


def _expert(number: int, role: Role, param: str, rows: Ops, site: Site) -> Slot:
    """A product of all experts: transposed in bf16 and in the model, by rows in MXFP4."""
    at = f"model.layers.{number}.mlp.experts.{param}"
    ops = (Transposed(), *rows)
    ways = (Get(at, ops), Get(f"{at}_blocks", rows))
    name = f"layers.{number}.experts.{role.value}"
    return Slot(name, role, at, ways, ops, site, Stack.EXPERTS, adds=role is Role.DOWN)


def _bias(number: int, role: Role, param: str, columns: Ops) -> Slot:
    at = f"model.layers.{number}.mlp.experts.{param}_bias"
    return Slot(f"layers.{number}.experts.{role.value}.bias", Role.BIAS, at, (Get(at, columns),), columns)


GPT_OSS = Family(
    name="gpt_oss",
    classes=("GptOssForCausalLM",),
    model_type="gpt_oss",
    shape=moe_shape,
    layer=layer,
    ends=ends,
    known=SHAPE_KEYS
    | {"num_local_experts", "num_experts", "num_experts_per_tok", "swiglu_alpha", "swiglu_limit"},
    says={
        "experts_per_token": (4,),
        "initial_context_length": (4096,),
        "max_window_layers": (None,),
    },
)
