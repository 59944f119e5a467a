"""The multiple-choice knapsack: one option a unit, least total KL divergence within a number of bytes."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moequant.errors import PlanError
from moequant.values import Weight

STATES = 20_000
"""Partial solutions kept a unit: bounds time and memory, above a hundred units or so it makes the search
a beam instead of an exact one."""


@dataclass(frozen=True, slots=True)
class Option:
    """One format for a unit: what it costs in bytes and what KL divergence it is expected to cost."""

    format: str
    bytes: int
    kl: float


@dataclass(frozen=True, slots=True)
class Unit:
    """Weights that must share one format, and the formats they may have.

    Gate and up of a layer are one unit: llama.cpp fuses their products on the GPU only
    when their types agree.
    """

    weights: tuple[Weight, ...]
    options: tuple[Option, ...]


def allocate(units: Sequence[Unit], budget: int) -> list[Option]:
    """One option a unit with the least total KL divergence within `budget` bytes.

    Greedy steps on the lower convex hulls give a first solution and, at the step that no
    longer fits, the price of a byte; at that price no solution can beat the sum of every
    unit's cheapest option. Partial solutions that already lose more against it than the
    first solution does are dropped, the rest are merged unit by unit (Dyer, Kayal and
    Walker's branch and bound for this problem, as dynamic programming). PlanError when the
    smallest options do not fit.
    """
    floor = sum(min(option.bytes for option in unit.options) for unit in units)
    if floor > budget:
        raise PlanError(
            f"the smallest possible weights take {floor:,} bytes, the budget leaves {budget:,}; ask for "
            "a larger size"
        )
    first, price = _greedy([_hull(unit.options) for unit in units], budget)
    return _improve(units, budget, first, price)


def _greedy(hulls: list[tuple[Option, ...]], budget: int) -> tuple[list[Option], float]:
    """The hull steps that remove most of it per byte while they fit, and the rate of the first to fail."""
    level = [0] * len(hulls)
    spent, price = sum(hull[0].bytes for hull in hulls), 0.0
    steps = [(_rate(hull, 0), index) for index, hull in enumerate(hulls) if len(hull) > 1]
    heapq.heapify(steps)
    while steps:
        rate, index = heapq.heappop(steps)
        hull, at = hulls[index], level[index]
        cost = hull[at + 1].bytes - hull[at].bytes
        if spent + cost > budget:
            price = price or -rate
            continue
        spent += cost
        level[index] += 1
        if at + 2 < len(hull):
            heapq.heappush(steps, (_rate(hull, at + 1), index))
    return [hull[at] for hull, at in zip(hulls, level, strict=True)], price


def _rate(hull: tuple[Option, ...], at: int) -> float:
    """Minus the KL divergence that a byte removes in the step above `at`: a heap takes the smallest first."""
    low, high = hull[at], hull[at + 1]
    return (high.kl - low.kl) / (high.bytes - low.bytes)


def _hull(options: Iterable[Option]) -> tuple[Option, ...]:
    """Options on the lower convex hull of KL divergence over bytes, smallest first."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda option: (option.bytes, option.kl)):
        if hull and option.kl >= hull[-1].kl:
            continue
        while len(hull) > 1 and (
            (hull[-1].kl - hull[-2].kl) * (option.bytes - hull[-2].bytes)
            >= (option.kl - hull[-2].kl) * (hull[-1].bytes - hull[-2].bytes)
        ):
            hull.pop()
        hull.append(option)
    return tuple(hull)


def _improve(units: Sequence[Unit], budget: int, first: list[Option], price: float) -> list[Option]:
    """The best solution that beats `first`, or `first` itself."""
    menus = [tuple(dict.fromkeys(_efficient(unit.options))) for unit in units]
    ideal = [min(option.kl + price * option.bytes for option in menu) for menu in menus]
    # What a solution may lose against the ideal at that price and still beat the first one.
    gap = sum(option.kl for option in first) - (sum(ideal) - price * budget)
    smallest = [min(option.bytes for option in menu) for menu in menus]
    rest = np.cumsum([0, *smallest[::-1]])[::-1]  # [units + 1] bytes that the units from here on need
    spent, lost = np.zeros(1, np.int64), np.zeros(1)
    trail: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for at, menu in enumerate(menus):
        sizes = np.array([option.bytes for option in menu], np.int64)
        losses = np.array([option.kl + price * option.bytes for option in menu]) - ideal[at]
        spent, lost = (spent[:, None] + sizes).ravel(), (lost[:, None] + losses).ravel()
        keep = np.flatnonzero((spent <= budget - rest[at + 1]) & (lost <= gap * (1 + 1e-9)))
        if not len(keep):
            return first
        keep = keep[_undominated(spent[keep], lost[keep] - price * spent[keep])]
        if len(keep) > STATES:
            keep = np.sort(keep[np.argpartition(lost[keep], STATES)[:STATES]])
        trail.append((keep // len(menu), keep % len(menu)))
        spent, lost = spent[keep], lost[keep]
    state = int(np.argmin(lost - price * spent))
    found: list[Option] = []
    for menu, (before, choice) in zip(reversed(menus), reversed(trail), strict=True):
        found.append(menu[int(choice[state])])
        state = int(before[state])
    found.reverse()
    return min(first, found, key=lambda options: sum(option.kl for option in options))


def _efficient(options: Iterable[Option]) -> list[Option]:
    """Options that no other one undercuts in bytes and in KL divergence, smallest first."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda option: (option.bytes, option.kl)):
        if not kept or option.kl < kept[-1].kl:
            kept.append(option)
    return kept


def _undominated(spent: NDArray[np.int64], kl: NDArray[np.float64]) -> NDArray[np.int64]:
    """Indices of the states that no other beats in bytes and kl."""
    order = np.lexsort((kl, spent))
    best = np.minimum.accumulate(kl[order])
    fresh = np.ones(len(order), bool)
    fresh[1:] = kl[order][1:] < best[:-1]
    return order[fresh]
