"""Allocation: never above the budget, never worse than a smaller choice, gate and up alike."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moequant.checkpoint import open_checkpoint
from moequant.conversion import facts
from moequant.errors import PlanError
from moequant.plan import Option, Unit, allocate, packed_bytes, preset_plan
from moequant.presets import BASE_TYPES, ModelFacts, llama_cpp_type, use_more_bits
from moequant.values import Role, Weight
from tests import models


def weight(name: str, role: Role, *shape: int, layer: int | None = 0) -> Weight:
    return Weight(name, role, layer, shape, (), name, (0, shape[0]), None)


options = st.lists(
    st.tuples(st.integers(1, 1000), st.floats(0, 10)), min_size=1, max_size=5, unique_by=lambda o: o[0]
)


@given(st.lists(options, min_size=1, max_size=8), st.floats(1.0, 3.0))
def test_allocation_fits_and_beats_the_floor(menu, slack: float) -> None:
    units = [Unit((), tuple(Option(str(size), size, damage) for size, damage in sorted(row))) for row in menu]
    floor = sum(min(option.bytes for option in unit.options) for unit in units)
    budget = int(floor * slack)
    chosen = allocate(units, budget)
    assert sum(option.bytes for option in chosen) <= budget
    smallest = sum(min(unit.options, key=lambda o: o.bytes).damage for unit in units)
    assert sum(option.damage for option in chosen) <= smallest + 1e-9


def test_a_generous_budget_buys_the_least_damage() -> None:
    units = [Unit((), (Option("a", 1, 5.0), Option("b", 2, 1.0), Option("c", 9, 0.5)))] * 3
    assert [option.format for option in allocate(units, 27)] == ["c"] * 3
    assert [option.format for option in allocate(units, 6)] == ["b"] * 3


def test_a_budget_below_the_floor_is_an_error() -> None:
    with pytest.raises(PlanError, match="smallest possible"):
        allocate([Unit((), (Option("a", 10, 1.0),))], 9)


@pytest.mark.parametrize("preset", BASE_TYPES)
@pytest.mark.parametrize("family", models.CONFIGS)
def test_presets_are_no_larger_than_llama_cpp(tiny, family: str, preset: str) -> None:
    checkpoint = open_checkpoint(tiny(family))
    known = facts(checkpoint)
    plan = preset_plan(checkpoint.weights, preset, known)
    theirs = sum(packed_bytes(llama_cpp_type(preset, w, known), w) for w in checkpoint.weights)
    assert plan.bytes <= theirs
    types = {choice.weight: choice.format for choice in plan.choices}
    for layer in range(checkpoint.n_layers):
        name = "_exps" if checkpoint.n_experts else ""
        assert types[f"blk.{layer}.ffn_gate{name}.weight"] == types[f"blk.{layer}.ffn_up{name}.weight"]
    assert {types[w.name] for w in checkpoint.weights if w.role.keeps_precision} == {"F32"}


def test_rows_that_256_does_not_divide_fall_back_and_say_so() -> None:
    rows = [
        weight("blk.0.ffn_down_exps.weight", Role.DOWN, 4, 256, 1408),
        weight("blk.0.odd.weight", Role.ATTN_OUT, 256, 1000),
        weight("blk.0.norm.weight", Role.NORM, 256),
    ]
    plan = preset_plan(tuple(rows), "Q4_K_S", ModelFacts(1, 4, 1, False))
    down, odd, norm = plan.choices
    assert down.format == "Q5_0" and "256 does not divide rows of 1408" in down.reason
    assert odd.format == "F16" and "32 does not divide rows of 1000" in odd.reason
    assert norm.format == "F32"


def test_unknown_presets_are_listed() -> None:
    with pytest.raises(PlanError, match=r"Q9_Z.*Q4_K_M"):
        preset_plan((), "Q9_Z", ModelFacts(1, 0, 1, False))


def test_llama_cpp_rules_equal_its_own_files(mix) -> None:
    checkpoint = open_checkpoint(mix)
    recorded = json.loads((models.SHARED / "baselines" / "mix.types.json").read_text())
    for preset in BASE_TYPES.keys() & recorded.keys():
        for w in checkpoint.weights:
            assert llama_cpp_type(preset, w, facts(checkpoint)) == recorded[preset][w.name], (preset, w.name)


def test_more_bits_at_both_ends_and_every_third_layer() -> None:
    # 32 layers, as in Mixtral-8x7B: the layers llama.cpp gives more bits.
    chosen = [layer for layer in range(32) if use_more_bits(layer, 32)]
    assert chosen == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
