"""The knapsack against exhaustive search."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moequant.errors import PlanError
from moequant.plan import Option, Unit, allocate

menus = st.lists(
    st.lists(st.tuples(st.integers(1, 60), st.floats(0, 10)), min_size=1, max_size=5),
    min_size=1,
    max_size=5,
)


def units_of(menu: list[list[tuple[int, float]]]) -> list[Unit]:
    return [Unit((), tuple(Option(f"{size}", size, kl) for size, kl in row)) for row in menu]


@given(menus, st.floats(0, 1))
def test_equal_to_exhaustive_search(menu, spare: float) -> None:
    units = units_of(menu)
    floor = sum(min(option.bytes for option in unit.options) for unit in units)
    ceiling = sum(max(option.bytes for option in unit.options) for unit in units)
    budget = floor + int(spare * (ceiling - floor))
    chosen = allocate(units, budget)
    assert all(option in unit.options for option, unit in zip(chosen, units, strict=True))
    assert sum(option.bytes for option in chosen) <= budget
    best = min(
        sum(option.kl for option in options)
        for options in itertools.product(*(unit.options for unit in units))
        if sum(option.bytes for option in options) <= budget
    )
    assert sum(option.kl for option in chosen) == pytest.approx(best, rel=1e-6, abs=1e-9)


def test_a_generous_budget_buys_the_least_kl() -> None:
    units = [Unit((), (Option("a", 1, 5.0), Option("b", 2, 1.0), Option("c", 9, 0.5)))] * 3
    assert [option.format for option in allocate(units, 27)] == ["c"] * 3
    assert [option.format for option in allocate(units, 6)] == ["b"] * 3


def test_options_off_the_hull_fill_what_is_left() -> None:
    # b lies above the line from a to c, so no price of a byte chooses it, but it is all that fits.
    units = [Unit((), (Option("a", 1, 10.0), Option("b", 5, 9.0), Option("c", 9, 0.0)))]
    assert [option.format for option in allocate(units, 8)] == ["b"]


def test_hundreds_of_units_take_seconds_and_leave_little() -> None:
    bits = (1.5625, 2.0625, 2.625, 3.4375, 4.5, 5.5, 6.5625, 8.5)
    units = [
        Unit((), tuple(Option(f"{b}", int(b * n * 1024), (1 + n % 7) * 4.0**-b) for b in bits))
        for n in range(64, 364)
    ]
    budget = sum(unit.options[0].bytes for unit in units) * 2
    assert 0 <= budget - sum(option.bytes for option in allocate(units, budget)) < budget / 10_000


def test_a_budget_below_the_floor_is_an_error() -> None:
    with pytest.raises(PlanError, match="smallest possible"):
        allocate([Unit((), (Option("a", 10, 1.0),))], 9)
