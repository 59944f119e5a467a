"""Which format each weight gets: one budget for the whole file, spent where it buys most.

Pure arithmetic on names, shapes and damages; nothing here knows torch or bytes. A preset
starts every weight at its base type and raises weights, one step at a time, by the
damage that a byte takes away, until the file is as large as llama.cpp's of that name.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from moequant.errors import PlanError
from moequant.presets import BASE_TYPES, ModelFacts, llama_cpp_type
from moequant.values import Choice, Plan, Role, Weight

ALIGNMENT = 32
"""GGUF pads every tensor to a multiple of this many bytes."""

LADDER = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
"""Types a preset chooses from, when 256 divides the rows."""

SHORT_LADDER = ("IQ4_NL", "Q5_0", "Q5_1", "Q8_0")
"""Types with blocks of 32, for rows that 256 does not divide."""

_SHORT_BASE = {"Q2_K": "IQ4_NL", "Q3_K": "IQ4_NL", "Q4_K": "IQ4_NL", "Q5_K": "Q5_0", "Q6_K": "Q8_0"}

RELATIVE_ERROR: Mapping[str, float] = {
    "Q2_K": 6.2e-2,
    "Q3_K": 1.9e-2,
    "IQ4_NL": 5.0e-3,
    "Q4_K": 4.4e-3,
    "Q5_0": 1.5e-3,
    "Q5_1": 1.05e-3,
    "Q5_K": 1.08e-3,
    "Q6_K": 2.5e-4,
    "Q8_0": 2.2e-5,
}
"""Importance-weighted squared error over squared weight, default effort, experts of two trained models
(`benchmarks/sensitivity.py`, results beside it)."""

SENSITIVITY: Mapping[Role, float] = {
    Role.EMBEDDING: 0.41,
    Role.OUTPUT: 0.75,
    Role.ATTN_Q: 0.35,
    Role.ATTN_K: 0.35,
    Role.ATTN_V: 0.70,
    Role.ATTN_OUT: 0.80,
    Role.GATE: 0.50,
    Role.UP: 0.49,
    Role.DOWN: 1.00,
    Role.DENSE_GATE: 0.50,
    Role.DENSE_UP: 0.49,
    Role.DENSE_DOWN: 1.00,
}
"""KL divergence per unit of relative error in all of a role's weights, each layer an equal share of it.

Between what one weight at a time costs in two trained models (`benchmarks/sensitivity.py`, results
beside it) and what whole plans cost them. All experts of a layer count as one weight, because a
token's top-k weights add up to about one.
"""

EARLY_DOWN = 2.0
"""Down projections of the first eighth of the layers count this many times: errors there pass through
everything behind them (6 times the later layers' in one of those models, equal in the other; llama.cpp's
rules raise the same layers)."""


@dataclass(frozen=True, slots=True)
class Option:
    """One format for a unit: what it weighs in bytes and what damage it is expected to do."""

    format: str
    bytes: int
    damage: float


@dataclass(frozen=True, slots=True)
class Unit:
    """Weights that must share one format, and the formats they may have, smallest first.

    Gate and up of a layer are one unit: llama.cpp fuses their products on the GPU only
    when their types agree.
    """

    weights: tuple[Weight, ...]
    options: tuple[Option, ...]


def packed_bytes(format_name: str, weight: Weight) -> int:
    """Bytes of `weight` in that format; PlanError when the format's block does not divide the rows."""
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[format_name]]
    if weight.n_in % block:
        raise PlanError(
            f"{weight.name}: {format_name} needs rows of a multiple of {block}, not {weight.n_in}"
        )
    return weight.numel // int(block) * int(block_bytes)


def preset_plan(weights: tuple[Weight, ...], preset: str, facts: ModelFacts) -> Plan:
    """A plan no larger than llama.cpp's file of that name. PlanError for an unknown preset."""
    if preset not in BASE_TYPES:
        raise PlanError(f"unknown type {preset!r}; known: {', '.join(BASE_TYPES)}")
    budget = sum(_aligned(packed_bytes(llama_cpp_type(preset, weight, facts), weight)) for weight in weights)
    units = [Unit(group, _options(group, BASE_TYPES[preset], facts.layers)) for group in _groups(weights)]
    chosen = allocate(units, budget)
    by_name = {
        weight.name: Choice(
            weight.name,
            option.format,
            packed_bytes(option.format, weight),
            _reason(weight, option.format, BASE_TYPES[preset]),
        )
        for unit, option in zip(units, chosen, strict=True)
        for weight in unit.weights
    }
    return Plan(preset, tuple(by_name[weight.name] for weight in weights), budget)


def allocate(units: list[Unit], budget: int) -> list[Option]:
    """One option a unit with the least total damage that greedy steps reach within `budget` bytes.

    Each unit's options are reduced to their lower convex hull; every unit starts at its
    smallest option and the step that removes most damage per byte is taken while it fits.
    PlanError when the smallest options do not fit.
    """
    hulls = [_hull(unit.options) for unit in units]
    level = [0] * len(units)
    spent = sum(hull[0].bytes for hull in hulls)
    if spent > budget:
        raise PlanError(f"the smallest possible file has {spent} bytes of weights, the budget is {budget}")
    steps = [(_rate(hull, 0), index) for index, hull in enumerate(hulls) if len(hull) > 1]
    heapq.heapify(steps)
    while steps:
        _, index = heapq.heappop(steps)
        hull, at = hulls[index], level[index]
        cost = hull[at + 1].bytes - hull[at].bytes
        if spent + cost > budget:
            continue
        spent += cost
        level[index] += 1
        if at + 2 < len(hull):
            heapq.heappush(steps, (_rate(hull, at + 1), index))
    return [hull[at] for hull, at in zip(hulls, level, strict=True)]


def _rate(hull: tuple[Option, ...], at: int) -> float:
    """Minus the damage that a byte removes in the step above `at`: the heap takes the smallest first."""
    low, high = hull[at], hull[at + 1]
    return (high.damage - low.damage) / (high.bytes - low.bytes)


def _hull(options: Iterable[Option]) -> tuple[Option, ...]:
    """Options on the lower convex hull of damage over bytes, smallest first."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda option: (option.bytes, option.damage)):
        if hull and option.damage >= hull[-1].damage:
            continue
        while len(hull) > 1 and (
            (hull[-1].damage - hull[-2].damage) * (option.bytes - hull[-2].bytes)
            >= (option.damage - hull[-2].damage) * (hull[-1].bytes - hull[-2].bytes)
        ):
            hull.pop()
        hull.append(option)
    return tuple(hull)


def _groups(weights: tuple[Weight, ...]) -> list[tuple[Weight, ...]]:
    """Weights in order, gate and up of the same layer together."""
    groups: dict[object, list[Weight]] = {}
    for weight in weights:
        pair = weight.role in (Role.GATE, Role.UP, Role.DENSE_GATE, Role.DENSE_UP)
        groups.setdefault(("gate_up", weight.layer) if pair else weight.name, []).append(weight)
    return [tuple(group) for group in groups.values()]


def _options(group: tuple[Weight, ...], base: str, layers: int) -> tuple[Option, ...]:
    """The formats a group may have under a preset of that base type, with their expected damage."""
    first = group[0]
    if first.role.keeps_precision or len(first.shape) < 2:
        names: tuple[str, ...] = ("F32",)
    elif base not in LADDER:
        names = (base,)
    elif base == "Q8_0":
        names = ("Q8_0",) if first.n_in % 32 == 0 else ("F16",)
    elif first.n_in % 256 == 0:
        names = LADDER[LADDER.index(base) :]
    elif first.n_in % 32 == 0:
        names = SHORT_LADDER[SHORT_LADDER.index(_SHORT_BASE[base]) :]
    else:
        names = ("F16",)
    sensitivity = sum(_sensitivity(weight, layers) for weight in group)
    return tuple(
        Option(
            name,
            sum(_aligned(packed_bytes(name, weight)) for weight in group),
            sensitivity * RELATIVE_ERROR.get(name, 0.0),
        )
        for name in names
    )


def _sensitivity(weight: Weight, layers: int) -> float:
    """A weight's share of its role's sensitivity."""
    whole = SENSITIVITY.get(weight.role, 0.0)
    if weight.layer is None:
        return whole
    early = weight.role in (Role.DOWN, Role.DENSE_DOWN) and weight.layer < max(1, layers // 8)
    return whole / layers * (EARLY_DOWN if early else 1.0)


def _reason(weight: Weight, chosen: str, base: str) -> str:
    if weight.role.keeps_precision or len(weight.shape) < 2:
        return f"{weight.role} stays F32"
    if weight.n_in % 32 and base not in ("F32", "F16", "BF16"):
        return f"fallback: 32 does not divide rows of {weight.n_in}"
    if weight.n_in % 256 and base in _SHORT_BASE:
        return f"fallback: 256 does not divide rows of {weight.n_in}"
    if chosen == base:
        return "base type"
    return "raised: pays most per byte" if weight.role.is_expert else "raised: every token uses it"


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
