"""gpt-oss: experts with biases, gate and up interleaved and, in bf16, transposed; sinks in attention.

Tools that want linear modules store experts one by one, each with a weight [out, in] and a bias:

| tool | an expert's matrices, under `mlp.experts` |
|---|---|
| llm-compressor | `{e}.gate_proj`, `{e}.up_proj`, `{e}.down_proj`; in old versions under `experts.{e}` |
| Unsloth | `gate_up_projs.{e}` with gate and up interleaved, `down_projs.{e}` |
"""

from __future__ import annotations

from moequant.families.base import Config, Family, Get, Slot
from moequant.families.blocks import PROJECTIONS, SHAPE_KEYS, attention, ends, moe_shape
from moequant.values import Role, Site, Stack
from moequant.values.ops import Ops, Part, Stacked, Transposed

ONE_BY_ONE = ("{e}", "experts.{e}")
"""Modules of one expert, where gate and up are matrices of their own."""

TOGETHER = {"gate_up_proj": "gate_up_projs.{e}", "down_proj": "down_projs.{e}"}
"""Those where they are one."""


def layer(config: Config, number: int) -> tuple[Slot, ...]:
    """One decoder layer."""
    at = f"model.layers.{number}"
    return (
        *attention(number, biased=True),
        Slot(f"layers.{number}.attn_sinks", Role.SINKS, f"{at}.self_attn.sinks"),
        *_router(number),
        *_experts(config, number),
    )


def _router(number: int) -> tuple[Slot, ...]:
    own, module = f"layers.{number}.router", f"model.layers.{number}.mlp.router"

    def ways(kind: str) -> tuple[Get, ...]:
        return Get(f"{module}.{kind}"), Get(f"{module}.linear.{kind}")  # Unsloth's second

    return (
        Slot(own, Role.ROUTER, f"{module}.weight", ways("weight")),
        Slot(f"{own}.bias", Role.BIAS, f"{module}.bias", ways("bias"), optional=True),
    )


def _experts(config: Config, number: int) -> tuple[Slot, ...]:
    """Gate, up and down; the release holds the first two as rows 0, 2, 4 … and 1, 3, 5 … of one tensor."""
    at = f"model.layers.{number}.mlp.experts"
    before = Site(f"layers.{number}.experts.input", at, "experts")
    inner = Site(f"layers.{number}.experts.inner", at, "inner")
    both, count = 2 * config.intermediate_size, int(config.num_local_experts)
    gate, up = ((start, both, 2) for start in (0, 1))
    return (
        _expert(number, Role.GATE, "gate_up_proj", (Part(*gate),), before),
        _bias(number, Role.GATE, "gate_up_proj", (Part(*gate, axis=-1),), count),
        _expert(number, Role.UP, "gate_up_proj", (Part(*up),), before),
        _bias(number, Role.UP, "gate_up_proj", (Part(*up, axis=-1),), count),
        _expert(number, Role.DOWN, "down_proj", (), inner),
        _bias(number, Role.DOWN, "down_proj", (), count),
    )


def _expert(number: int, role: Role, param: str, rows: Ops, site: Site) -> Slot:
    """A product of all experts: transposed in bf16 and in the model, by rows in MXFP4."""
    at = f"model.layers.{number}.mlp.experts"
    ops = (Transposed(), *rows)
    ways = (
        Get(f"{at}.{param}", ops),
        Get(f"{at}.{param}_blocks", rows),
        *(Get(f"{at}.{module}.{_projection(role)}.weight") for module in ONE_BY_ONE),
        Get(f"{at}.{TOGETHER[param]}.weight", rows),
    )
    name = f"layers.{number}.experts.{role.value}"
    return Slot(name, role, f"{at}.{param}", ways, ops, site, Stack.EXPERTS, adds=role is Role.DOWN)


def _bias(number: int, role: Role, param: str, columns: Ops, count: int) -> Slot:
    """The biases of all experts, [E, out]."""
    at = f"model.layers.{number}.mlp.experts"
    stacked = Stacked(count, axis=-1)

    def each(module: str, ops: Ops) -> Get:
        first, *others = (f"{at}.{module.replace('{e}', str(expert))}.bias" for expert in range(count))
        return Get(first, (stacked, *ops), below=tuple(others))

    fused = f"{at}.{param}_bias"
    ways = (
        Get(fused, columns),
        *(each(f"{module}.{_projection(role)}", ()) for module in ONE_BY_ONE),
        each(TOGETHER[param], columns),
    )
    return Slot(f"layers.{number}.experts.{role.value}.bias", Role.BIAS, fused, ways, columns)


def _projection(role: Role) -> str:
    return PROJECTIONS[(Role.GATE, Role.UP, Role.DOWN).index(role)]


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
