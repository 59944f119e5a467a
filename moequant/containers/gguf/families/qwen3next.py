"""llama.cpp's `qwen3next` and `qwen35moe`: delta nets and gated attention, experts in every layer.

Norms are stored as 1 + w, decays as -exp(A). `qwen3next` has queries, keys and values of a delta net in one
tensor and its gates in another; `qwen35moe` has value heads in the order [of a key head, key head].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from moequant.containers.gguf.families.base import (
    Drafting,
    Export,
    FileTensor,
    Key,
    both_kinds,
    only,
    other_epsilon,
)
from moequant.containers.gguf.families.keys import (
    expert_counts,
    head_dim,
    head_sizes,
    rope_sections,
    rotated_part,
    sizes,
    turned_by_time,
)
from moequant.containers.gguf.families.qwen2moe import expert_widths, shared_gate
from moequant.families import Config
from moequant.families.delta_net import LINEAR, Heads
from moequant.values import Role, Weight
from moequant.values.ops import Grouped, NegativeExp, Ops, Plus, Taken

NAMES = {
    "ffn_norm": "post_attention_norm.weight",
    "ssm.qkv": "attn_qkv.weight",
    "ssm.gate": "attn_gate.weight",
}

SECTIONS = (11, 11, 10)
"""Qwen3.5's sections of rotary frequencies where a config gives none."""


def next_parts(config: Config, weight: Weight) -> tuple[FileTensor, ...] | None:
    """Tensors of `qwen3next`."""
    if weight.role is Role.ATTN_QKV:
        heads = Heads.of(config)
        return (
            FileTensor("attn_qkv.weight", (Taken(by_kind(heads, "qkv")),), "ssm.qkv"),
            FileTensor("attn_gate.weight", (Taken(by_kind(heads, "z")),), "ssm.gate", Role.ATTN_GATE),
        )
    if weight.role is Role.STATE:
        return (FileTensor(ops=(NegativeExp(),)),)
    return _common(config, weight)


def tiled_parts(config: Config, weight: Weight) -> tuple[FileTensor, ...] | None:
    """Tensors of `qwen35moe`, whose value heads are tiled."""
    heads = Heads.of(config)
    rows, entries = Grouped(heads.keys, heads.each), Grouped(heads.keys, heads.each, axis=-1)
    own = weight.name.partition(".ssm.")[2]
    if own == "out":
        assert weight.site is not None
        site = replace(weight.site, name=f"{weight.site.name}.tiled", ops=(entries,))
        return (FileTensor(ops=(entries,), site=site),)
    tiled: dict[str, Ops] = {
        "qkv": (Taken(tiled_values(heads)),),
        "conv": (Taken(tiled_values(heads)),),
        "gate": (rows,),
        "beta": (rows,),
        "alpha": (rows,),
        "dt": (entries,),
        "a": (entries, NegativeExp()),
    }
    return (FileTensor(ops=tiled[own]),) if own in tiled else _common(config, weight)


def _common(config: Config, weight: Weight) -> tuple[FileTensor, ...] | None:
    if weight.role is Role.NORM and not weight.name.endswith(".ssm.norm"):
        return (FileTensor(ops=(Plus(1.0),)),)
    return shared_gate(config, weight)


@cache
def by_kind(heads: Heads, kinds: str) -> tuple[int, ...]:
    """Rows of all queries ("q"), keys ("k"), values ("v") or gates ("z"), out of those of each key head
    [q k v z]."""
    values = heads.each * heads.value_dim
    begins = {"q": 0, "k": heads.key_dim, "v": 2 * heads.key_dim, "z": 2 * heads.key_dim + values}
    counts = {"q": heads.key_dim, "k": heads.key_dim, "v": values, "z": values}
    each = 2 * (heads.key_dim + values)
    return tuple(
        head * each + begins[kind] + row
        for kind in kinds
        for head in range(heads.keys)
        for row in range(counts[kind])
    )


@cache
def tiled_values(heads: Heads) -> tuple[int, ...]:
    """Rows of queries and keys as they are, then those of value heads, tiled."""
    first, n = heads.queries_and_keys, heads.value_dim
    tiled = (
        first + (key * heads.each + value) * n + row
        for value in range(heads.each)
        for key in range(heads.keys)
        for row in range(n)
    )
    return (*range(first), *tiled)


def next_keys(config: Config) -> tuple[Key, ...]:
    """Keys of Qwen3-Next. Builds that know no list of recurrent layers read how far full ones are apart."""
    mixers = [kind == LINEAR for kind in config.layer_types]
    interval = mixers.index(False) + 1 if False in mixers else len(mixers) + 1
    return (
        *sizes(config),
        *expert_counts(config),
        *expert_widths(config),
        *head_sizes(config, rotated_part(config)),
        Key("ssm.conv_kernel", "u32", int(config.linear_conv_kernel_dim)),
        Key("ssm.state_size", "u32", int(config.linear_key_head_dim)),
        Key("ssm.group_count", "u32", int(config.linear_num_key_heads)),
        Key("ssm.time_step_rank", "u32", int(config.linear_num_value_heads)),
        Key("ssm.inner_size", "u32", int(config.linear_value_head_dim * config.linear_num_value_heads)),
        Key("attention.recurrent_layers", "bools", mixers),
        Key("full_attention_interval", "u32", interval),
    )


def rotated(config: Config) -> int:
    """How many dimensions of a head are rotated."""
    return int(head_dim(config) * rotated_part(config))


def tiled_keys(config: Config) -> tuple[Key, ...]:
    """Keys of Qwen3.5."""
    return (*next_keys(config), rope_sections(config, rotated(config)))


def next_complaints(config: Config, arch: str = "qwen3next") -> Iterator[str]:
    """What the graph takes for granted."""
    yield from only(config, arch, "hidden_act", "silu")
    yield from only(config, arch, "attention_bias", False)
    yield from only(config, arch, "norm_topk_prob", True)
    yield from only(config, arch, "decoder_sparse_step", 1)
    yield from only(config, arch, "mlp_only_layers", [], None)
    yield from only(config, arch, "linear_value_head_dim", config.linear_key_head_dim)
    yield from both_kinds("layer_types", (kind == LINEAR for kind in config.layer_types), arch)


def tiled_complaints(config: Config) -> Iterator[str]:
    """What the graph of Qwen3.5 takes for granted."""
    return next_complaints(config, "qwen35moe")


def next_warnings(config: Config) -> tuple[str, ...]:
    """What llama.cpp computes a little differently."""
    return (
        other_epsilon(config, "queries and keys of delta attention") if LINEAR in config.layer_types else ()
    )


def tiled_warnings(config: Config) -> tuple[str, ...]:
    """The same, and frequencies that no section covers."""
    return (*next_warnings(config), *turned_by_time(config, rotated(config), SECTIONS))


def not_recurrent(config: Config, number: int) -> Mapping[str, Any]:
    """A layer that predicts has full attention."""
    return {"attention.recurrent_layers": False}


QWEN3_NEXT = Export(
    "qwen3next",
    next_keys,
    next_complaints,
    NAMES,
    next_parts,
    warnings=next_warnings,
    drafting=Drafting(not_recurrent),
)
QWEN3_5_MOE = Export(
    "qwen35moe",
    tiled_keys,
    tiled_complaints,
    NAMES,
    tiled_parts,
    warnings=tiled_warnings,
    drafting=Drafting(not_recurrent),
)
