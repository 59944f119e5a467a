"""The whole size/quality curve of a model: what every file size buys."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from moequant.containers.gguf.presets import BASE_TYPES, UNQUANTIZED, ModelFacts, llama_cpp_types
from moequant.containers.gguf.sizes import Budget, data_bytes
from moequant.errors import PlanError
from moequant.plan.choose import NO_PINS, make_plan, make_units
from moequant.plan.sensitivity import Sensitivities
from moequant.values import Plan, Weight

PlannedFormat = Literal["gguf", "safetensors"]


@dataclass(frozen=True, slots=True)
class Point:
    """A file: its size, predicted KL divergence, its name, and the plan (None: llama.cpp's types)."""

    file_bytes: int
    predicted: float
    label: str
    plan: Plan | None = None


@dataclass(frozen=True, slots=True)
class Curve:
    """What is drawn: our plans from the smallest to the largest file, those that somebody asked for, and
    what others would make, each with our plan of that size: of a GGUF file llama.cpp's presets, of a folder
    one scheme for all experts. `source` says where predictions come from, `weights` how many the model has.
    """

    title: str
    plans: Sequence[Point]
    wanted: Sequence[Point]
    presets: Sequence[tuple[Point, Point]]
    weights: int
    source: str
    format: PlannedFormat = "gguf"


def curve(
    weights: tuple[Weight, ...],
    facts: ModelFacts,
    sensitivities: Sensitivities,
    overhead: int,
    steps: int = 32,
    pins: Mapping[str, str] = NO_PINS,
) -> list[Point]:
    """Plans at `steps` sizes from the smallest possible file to the largest useful one, evenly by ratio."""
    units = make_units(weights, sensitivities, pins=pins)
    low = overhead + sum(min(option.bytes for option in unit.options) for unit in units)
    high = overhead + sum(max(option.bytes for option in unit.options) for unit in units)
    ratio = (high / low) ** (1 / max(1, steps - 1))
    sizes = sorted({min(high, round(low * ratio**step)) for step in range(steps)} | {low, high})
    budgets = (Budget(f"{size:,}", file_bytes=size) for size in sizes)
    return points(weights, facts, sensitivities, overhead, budgets, pins)


def points(
    weights: tuple[Weight, ...],
    facts: ModelFacts,
    sensitivities: Sensitivities,
    overhead: int,
    budgets: Iterable[Budget],
    pins: Mapping[str, str] = NO_PINS,
) -> list[Point]:
    """The best plan for each budget, in their order. PlanError for one that is too small."""
    made = []
    for budget in budgets:
        plan = make_plan(weights, budget, facts, sensitivities, overhead, pins)
        types = {choice.weight: choice.format for choice in plan.choices}
        made.append(Point(overhead + data_bytes(weights, types), plan.kl or 0.0, budget.text, plan))
    return made


def preset_points(
    weights: tuple[Weight, ...],
    facts: ModelFacts,
    sensitivities: Sensitivities,
    overhead: int,
    pins: Mapping[str, str] = NO_PINS,
) -> list[tuple[Point, Point]]:
    """llama.cpp's files, smallest first: its types with our rounding, and our plan of that size.

    Presets with a type that was not measured are left out, and those smaller than what is pinned.
    """
    made = []
    for preset in BASE_TYPES:
        types = llama_cpp_types(preset, weights, facts)
        rows = [(sensitivities.table[weight.name], types[weight.name]) for weight in weights]
        if preset in UNQUANTIZED or any(name not in row and name not in UNQUANTIZED for row, name in rows):
            continue
        total = sum(row.get(name, 0.0) for row, name in rows)
        theirs = Point(overhead + data_bytes(weights, types), sensitivities.predict(total), preset)
        budget = Budget(f"the size of {preset}", file_bytes=theirs.file_bytes)
        try:
            (ours,) = points(weights, facts, sensitivities, overhead, [budget], pins)
        except PlanError:
            if not pins:
                raise
            continue
        made.append((theirs, ours))
    return sorted(made, key=lambda pair: pair[0].file_bytes)
