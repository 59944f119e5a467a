"""MiMo-V2-Flash, V2.5 and V2.6-Flash: values narrower than keys; sinks and twice the key heads in layers with
a window; dense layers first, then DeepSeek-V3's router without shared experts. Releases after the first keep
queries, keys and values in one matrix, in the shares of as many ranks as full layers have key heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from moequant.errors import FamilyError
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
    seen,
)
from moequant.families.deepseek_v3 import ROUTER_SAYS, ROUTING_KEYS
from moequant.families.predictions import APPENDED, count, last_of, like, parts
from moequant.values import Role
from moequant.values.ops import Joined, Ops, Part, Stacked, Taken

FULL, WINDOW = "full_attention", "sliding_attention"


def has_window(config: Config, number: int) -> bool:
    """Whether a layer looks back only so far."""
    return bool(config.layer_types[number] == WINDOW)


@dataclass(frozen=True, slots=True)
class Shares:
    """Rows of one matrix of queries, keys and values: of each rank first those, in this order."""

    ranks: int
    sizes: tuple[int, int, int]

    @classmethod
    def of(cls, config: Config, window: bool) -> Shares:
        """Those of a layer, by whether it has a window."""
        ranks, each = int(config.num_key_value_heads), 2 if window else 1
        queries = int(config.num_attention_heads * config.head_dim) // ranks
        return cls(ranks, (queries, each * int(config.head_dim), each * int(config.v_head_dim)))

    def part(self, which: int) -> Ops:
        """What makes the queries (0), keys (1) or values (2) of the matrix."""
        first = sum(self.sizes[:which])
        return (Stacked(self.ranks), Part(first, first + self.sizes[which]), Joined())

    def sorted(self) -> Ops:
        """What puts all queries first, then all keys, then all values."""
        total, firsts = sum(self.sizes), [sum(self.sizes[:which]) for which in range(3)]
        return (
            Taken(
                tuple(
                    rank * total + first + row
                    for first, size in zip(firsts, self.sizes, strict=True)
                    for rank in range(self.ranks)
                    for row in range(size)
                )
            ),
        )


def layer(config: Config, number: int) -> tuple[Slot, ...]:
    """One decoder layer."""
    heads = _attention(config, number)
    if config.mlp_layer_types[number] != "sparse":
        return (*heads, *gated_ffn(number))
    experts = Experts(config.moe_intermediate_size).slots(number)
    return (*heads, router(number), correction(number), *experts)


PROJECTIONS = (Role.ATTN_Q, Role.ATTN_K, Role.ATTN_V)


def _attention(config: Config, number: int) -> tuple[Slot, ...]:
    """Norms and projections; sinks where there is a window."""
    window = has_window(config, number)
    at, shares = f"model.layers.{number}.self_attn", Shares.of(config, window)
    slots = [
        replace(
            slot,
            get=(
                Get(slot.param),
                Get(f"{at}.qkv_proj.weight", shares.part(PROJECTIONS.index(slot.role))),
            ),
        )
        if slot.role in PROJECTIONS
        else slot
        for slot in attention(number, biased=True)
    ]
    if window:
        ways = (Get(f"{at}.attention_sink_bias"), Get(f"{at}.sinks"))
        slots.append(Slot(f"layers.{number}.attn_sinks", Role.SINKS, f"{at}.sinks", ways))
    return tuple(slots)


PREDICTED = 3
"""Layers that predict, in all releases; the configs of the first ones do not say so."""


def predictions(config: Config) -> tuple[tuple[Slot, ...], ...]:
    """Layers with a window and a dense block. llama.cpp wants queries, keys and values in one matrix."""
    first, found = int(config.num_hidden_layers), list[tuple[Slot, ...]]()
    window, dense = last_of(config.layer_types, WINDOW), last_of(config.mlp_layer_types, "dense")
    for index in range(count(config) or PREDICTED):
        number, at = first + index, f"model.mtp.layers.{index}."
        block = (
            *like(_in_one(config, window), window, number, at),
            *like(gated_ffn(dense), dense, number, at),
        )
        names = {ours: at + theirs for ours, theirs in (APPENDED | {"norm": "final_layernorm"}).items()}
        found.append((*(_named(slot) for slot in block), *parts(number, names)))
    return tuple(found)


def _in_one(config: Config, number: int) -> tuple[Slot, ...]:
    """Attention with a window, its queries, keys and values in one matrix."""
    at, slots = f"model.layers.{number}.self_attn", _attention(config, number)
    query, key, value = (f"{at}.{name}_proj.weight" for name in "qkv")
    ways = (
        Get(query, below=(key, value)),
        Get(f"{at}.qkv_proj.weight", Shares.of(config, window=True).sorted()),
    )
    site = seen(number, "attn.input", "self_attn.q_proj")
    one = Slot(f"layers.{number}.attn_qkv", Role.ATTN_QKV, "", ways, site=site)
    return (one, *(slot for slot in slots if slot.role not in (*PROJECTIONS, Role.BIAS)))


def _named(slot: Slot) -> Slot:
    """Under the name that layers which predict have for the norm between their blocks."""
    ours, theirs = "post_attention_layernorm", "pre_mlp_layernorm"
    return replace(slot, get=tuple(replace(way, name=way.name.replace(ours, theirs)) for way in slot.ways))


def skipped(config: Config) -> Mapping[str, str]:
    """What releases hold beside the layers that transformers runs."""
    return {
        r"model\.mtp\..*": PREDICTION,
        r"visual\..*": "vision: only text is converted",
        r"(audio_encoder|speech_embeddings)\..*": "audio: only text is converted",
    }


def dialect(raw: dict[str, Any]) -> dict[str, Any]:
    """What releases say of layers, norms and rotations, as the class reads it. FamilyError where layers with
    a window have other heads than the class gives them."""
    given = {key: value for key, value in raw.items() if key not in BEYOND_TEXT and value is not None}
    for key, expected in _heads(given).items():
        if (told := given.pop(key, None)) not in (None, expected):
            raise FamilyError(
                f"mimo_v2_flash: config key {key} = {told!r}: transformers' class computes {expected!r} in "
                "layers with a window"
            )
    lists = {
        "hybrid_layer_pattern": ("layer_types", (FULL, WINDOW)),
        "moe_layer_freq": ("mlp_layer_types", ("dense", "sparse")),
    }
    for theirs, (ours, kinds) in lists.items():
        if isinstance(told := given.pop(theirs, None), list):
            given.setdefault(ours, [kinds[bool(each)] for each in told])
    if (epsilon := given.pop("layernorm_epsilon", None)) is not None:
        given.setdefault("rms_norm_eps", epsilon)
    return _rotations(given)


def _heads(given: Mapping[str, Any]) -> dict[str, Any]:
    """What the class takes for layers with a window, of what the config says of the others."""
    same = {key: given.get(key) for key in ("num_attention_heads", "head_dim", "v_head_dim")}
    keys = given.get("num_key_value_heads")
    found = {f"swa_{key}": value for key, value in same.items() if value is not None}
    return found | ({"swa_num_key_value_heads": 2 * keys} if isinstance(keys, int) else {})


def _rotations(given: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters of either kind of layers, out of what releases say of both."""
    rope = given.get("rope_parameters") or given.pop("rope_scaling", None) or {}
    flat = {key: given.pop(key, None) for key in ("rope_theta", "swa_rope_theta", "partial_rotary_factor")}
    if FULL in rope or (not rope and not any(flat.values())):
        return given
    told = {key: value for key, value in flat.items() if value is not None}
    share = rope.get("partial_rotary_factor", told.get("partial_rotary_factor", 0.334))
    kind = rope.get("rope_type", rope.get("type", "default"))
    bases = {
        FULL: rope.get("rope_theta", told.get("rope_theta", 5_000_000.0)),
        WINDOW: told.get("swa_rope_theta", 10_000.0),
    }
    more = {key: rope[key] for key in rope.keys() - {"rope_theta", "rope_type", "type"}}
    given["rope_parameters"] = {
        layers: {**more, "rope_type": kind, "rope_theta": float(base), "partial_rotary_factor": share}
        for layers, base in bases.items()
    }
    return given


BEYOND_TEXT = frozenset(
    {
        "vision_config",
        "audio_config",
        "processor_config",
        "vision_model_type",
        *(f"{what}_token_id" for what in ("image", "video", "audio")),
        *(f"{what}_{end}_token_id" for what in ("vision", "video", "audio") for end in ("start", "end")),
    }
)
"""Config keys of releases that also see and hear."""

MIMO_V2_FLASH = Family(
    name="mimo_v2_flash",
    classes=("MiMoV2FlashForCausalLM", "MiMoV2ForCausalLM"),
    model_type="mimo_v2_flash",
    shape=moe_shape,
    layer=layer,
    ends=ends,
    known=SHAPE_KEYS
    | ROUTING_KEYS
    | {
        "v_head_dim",
        "mlp_layer_types",
        "attention_value_scale",
        "sliding_window_size",
        "attention_chunk_size",
        "hybrid_block_size",
        "moe_router_dtype",  # here, routers are computed in float32
    },
    says={
        **{key: told for key, told in ROUTER_SAYS.items() if key != "moe_layer_freq"},
        "attention_projection_layout": ("fused_qkv", "split"),  # names of tensors say it
        "add_full_attention_sink_bias": (False,),
        "add_swa_attention_sink_bias": (True,),
    },
    skipped=skipped,
    predictions=predictions,
    dialect=dialect,
)
