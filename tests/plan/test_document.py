"""Plans as JSON: what is written is read back, and what a person breaks is named."""

from __future__ import annotations

import json

import pytest

from moequant.checkpoint import open_checkpoint
from moequant.containers.gguf.export import export
from moequant.errors import PlanError
from moequant.plan import Budget, from_json, make_plan, plan_from_types, prior_sensitivities, read, to_json
from moequant.values import Role
from tests import models
from tests.plan.test_choose import FACTS, layers, types, weight


@pytest.fixture
def plan():
    return make_plan(layers(), Budget.of_bpw(3.6), FACTS, prior_sensitivities(layers(), 2))


def edited(plan, change) -> str:
    document = json.loads(to_json(plan))
    change(document["choices"])
    return json.dumps(document)


def test_a_plan_survives_the_round_trip(plan, tmp_path) -> None:
    assert from_json(to_json(plan), layers()) == plan
    file = tmp_path / "plan.json"
    file.write_text(to_json(plan))
    assert read(file, layers()) == plan
    assert len(to_json(plan).splitlines()) == len(plan.choices) + 10, "one line a weight"


def test_rows_may_come_in_any_order(plan) -> None:
    assert from_json(edited(plan, list.reverse), layers()) == plan


def test_an_edited_row_is_used_and_its_cost_is_unknown(plan) -> None:
    def change(rows) -> None:
        row = next(row for row in rows if row["weight"] == "layers.0.attn_v")
        row["format"] = "Q8_0"

    found = from_json(edited(plan, change), layers())
    choice = next(choice for choice in found.choices if choice.weight == "layers.0.attn_v")
    assert (choice.format, choice.bytes) == ("Q8_0", 128 * 256 * 34 // 32)
    assert choice.reason == "edited by hand" and choice.kl is None and found.kl is None
    assert found.budget >= found.bytes


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda rows: rows.pop(2), r"layers\.0\.ffn_norm is missing"),
        (lambda rows: rows.append(dict(rows[1])), r"layers\.0\.attn_v has two rows"),
        (lambda rows: rows.append({"weight": "layers.9.x", "format": "Q4_K"}), r"layers.9.x: .* no such"),
        (lambda rows: rows[1].update(format="Q4_Z"), r"layers\.0\.attn_v: unknown format 'Q4_Z'"),
        (lambda rows: rows[2].update(format="Q4_K"), r"layers\.0\.ffn_norm: a norm stays F32"),
        (lambda rows: rows[1].pop("format"), r"row 1 of choices needs a weight and a format"),
    ],
)
def test_a_broken_row_is_named(plan, change, says: str) -> None:
    with pytest.raises(PlanError, match=says) as found:
        from_json(edited(plan, change), layers(), "mine.json")
    assert str(found.value).startswith("mine.json: ") and "\n" not in str(found.value)


def test_a_block_that_does_not_divide_the_rows_is_named() -> None:
    rows = (weight("odd.weight", Role.DOWN, 4, 32, 96),)
    with pytest.raises(PlanError, match=r"odd.weight: Q4_K needs rows of a multiple of 256, not 96"):
        plan_from_types(rows, {"odd.weight": "Q4_K"})


@pytest.mark.parametrize("text", ["", "[1]", "3", '{"moequant_plan": 99}', '{"moequant_plan": 1}'])
def test_other_documents_are_refused(text: str) -> None:
    with pytest.raises(PlanError, match="moequant plan"):
        from_json(text, layers())


def test_a_missing_file_is_one_line(tmp_path) -> None:
    with pytest.raises(PlanError, match=r"none.json: cannot be read"):
        read(tmp_path / "none.json", layers())


def test_llama_cpp_types_are_a_plan(mix) -> None:
    recorded = json.loads((models.SHARED / "baselines" / "mix.types.json").read_text())
    exported = export(open_checkpoint(mix))
    weights, ours = exported.weights, exported.own_names
    for preset, theirs in recorded.items():
        given = {ours[name]: kind for name, kind in theirs.items()}
        found = plan_from_types(weights, given)
        assert types(found) == given and found.kl is None
        plan = plan_from_types(weights, given, "plan")
        assert from_json(json.dumps(theirs), weights, aliases=ours) == plan, preset
        assert from_json(json.dumps(given), weights) == plan
    with pytest.raises(PlanError, match="'IQ1_M' holds no type name"):
        from_json(json.dumps(recorded), weights)


def test_plans_of_version_1_have_the_names_of_gguf(plan, tmp_path) -> None:
    """And are still read: the same plan, what was edited in it included."""
    ours = {f"blk.{name}.weight": name for name in types(plan)}
    theirs = {name: old for old, name in ours.items()}
    document = json.loads(to_json(plan)) | {"moequant_plan": 1}
    for row in document["choices"]:
        row["weight"] = theirs[row["weight"]]
    file = tmp_path / "old.json"
    file.write_text(json.dumps(document))
    assert read(file, layers(), ours) == plan
    document["choices"][1]["format"] = "Q8_0"
    edited_by_hand = from_json(json.dumps(document), layers(), aliases=ours)
    assert edited_by_hand.choices[1].format == "Q8_0"
    assert edited_by_hand.choices[1].reason == "edited by hand"
    with pytest.raises(PlanError, match="the checkpoint has no such weight"):
        read(file, layers())
