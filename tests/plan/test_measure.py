"""Measured sensitivities: sampled errors are those of the whole, probes are real, and sums predict."""

from __future__ import annotations

from dataclasses import replace
from math import sqrt

import pytest
import torch

from moequant import formats
from moequant.checkpoint import load, open_checkpoint
from moequant.containers.gguf.export import export
from moequant.containers.gguf.presets import ModelFacts, facts
from moequant.containers.gguf.sizes import Budget, bits_of
from moequant.evaluate import score_row
from moequant.forward.experts import EXPERTS
from moequant.forward.model import build_model
from moequant.plan import candidates, make_plan, preset_plan
from moequant.plan.measure import Probing, fit, measure, sample_errors
from moequant.plan.menu import CHECKS, GgufMenu
from moequant.statistics.calibrate import calibrate
from moequant.statistics.importance import importance
from moequant.text.corpus import Rows
from moequant.values import Role
from tests import models

PROBING = Probing(tokens=2**20, rows=2, sample=1 << 12, effort="fast")


def rows(count: int, seed: int = 0, length: int = 64) -> Rows:
    ids = torch.randint(0, models.VOCAB, (count, length), generator=torch.Generator().manual_seed(seed))
    return Rows(ids, ("text",) * count, "random ids", ids.numel())


@pytest.fixture(scope="module")
def known(tiny):
    checkpoint = export(open_checkpoint(tiny("mixtral", num_hidden_layers=1))).checkpoint
    return checkpoint, calibrate(checkpoint, rows(8))


@pytest.fixture(scope="module")
def rules(tiny) -> ModelFacts:
    return facts(export(open_checkpoint(tiny("mixtral", num_hidden_layers=1))))


@pytest.fixture(scope="module")
def sensitivities(known):
    return measure(*known, rows(2, seed=1).ids, PROBING)


def find(checkpoint, name: str):
    return next(weight for weight in checkpoint.weights if weight.name == name)


def whole_error(weight, stats, name: str) -> float:
    """The definition, on every row of every expert."""
    values, columns = load(weight).float(), importance(stats)
    decoded = formats.dequantize(name, formats.quantize(name, values, columns, "fast"))
    mass = stats.gate_square[:, None, None] * columns[:, None, :].double()
    return float(
        ((values - decoded).double().square() * mass).sum() / (values.double().square() * mass).sum()
    )


@pytest.mark.parametrize("name", ["layers.0.experts.down", "layers.0.experts.up"])
def test_a_sample_has_the_error_of_the_whole(known, name: str) -> None:
    checkpoint, calibration = known
    weight = find(checkpoint, name)
    stats = calibration.inputs[weight.site.name]
    found = sample_errors(weight, stats, PROBING)
    assert tuple(found) == candidates(weight)
    for fmt in ("IQ2_XXS", "Q3_K", "Q6_K"):
        assert found[fmt] == pytest.approx(whole_error(weight, stats, fmt), rel=0.15)


def test_experts_count_by_their_mass(known) -> None:
    """One expert gets all tokens: only its error is seen, though few experts are sampled."""
    checkpoint, calibration = known
    weight = find(checkpoint, "layers.0.experts.down")
    stats = calibration.inputs[weight.site.name]
    alone = torch.zeros_like(stats.gate_square)
    alone[2] = 1.0
    lonely = replace(stats, gate_square=alone)
    few = sample_errors(weight, lonely, replace(PROBING, experts=2))
    assert few["Q3_K"] == pytest.approx(whole_error(weight, lonely, "Q3_K"), rel=0.15)


def test_what_stays_f32_costs_nothing(sensitivities, known) -> None:
    for weight in known[0].weights:
        if weight.role.keeps_precision:
            assert sensitivities.table[weight.name] == {"F32": 0.0}


def test_cost_grows_as_bits_shrink(sensitivities, known) -> None:
    for weight in known[0].weights:
        if not weight.role.keeps_precision:
            row = sensitivities.table[weight.name]
            assert row["IQ1_S"] > row["Q2_K"] > row["Q3_K"] > row["Q4_K"] > row["Q6_K"] > row["Q8_0"] >= 0
            assert sensitivities.per_error[weight.name] > 0
    for gate in (find(known[0], "layers.0.experts.gate"),):
        up = find(known[0], "layers.0.experts.up")
        assert sensitivities.per_error[gate.name] == sensitivities.per_error[up.name], "probed together"


def test_nothing_is_left_changed_by_probes(known, sensitivities) -> None:
    again = measure(*known, rows(2, seed=1).ids, PROBING)
    assert again == sensitivities


def test_what_is_pinned_is_not_measured_in_other_types(known, sensitivities, rules) -> None:
    """The plan is the one that comes out where it is; what whole plans cost is measured with the pins."""
    checkpoint, calibration = known
    pins = {"layers.0.experts.down": "Q6_K", "layers.0.attn_v": "BF16", "layers.0.attn_out": "MXFP4"}
    ids, budget = rows(2, seed=1).ids, Budget.of_bpw("4.5")
    settled = replace(PROBING, menu=GgufMenu(pins, settled=True))
    found = measure(checkpoint, calibration, ids, settled)
    whole = measure(checkpoint, calibration, ids, replace(PROBING, menu=GgufMenu(pins)))
    assert {name: tuple(found.table[name]) for name in pins} == {
        "layers.0.experts.down": ("Q6_K",),
        "layers.0.attn_v": (),
        "layers.0.attn_out": ("MXFP4",),
    }
    assert found.per_error["layers.0.attn_v"] == 0 < whole.per_error["layers.0.attn_v"], "no probe of it"
    for name, row in whole.table.items():
        assert {fmt: row[fmt] for fmt in found.table[name]} == found.table[name]
        assert name in pins or found.table[name] == sensitivities.table[name]
    ours, theirs = (make_plan(checkpoint.weights, budget, rules, each, 0, pins) for each in (found, whole))
    assert [each.format for each in ours.choices] == [each.format for each in theirs.choices]
    (down,) = [each for each in ours.choices if each.weight == "layers.0.experts.down"]
    assert down.kl > 0, "what a pinned weight costs is expected too"


def test_predictions_are_what_whole_plans_measure(known, sensitivities, rules) -> None:
    """The coarse plan of the checks, quantized and scored: the probes only had errors of that size."""
    checkpoint, calibration = known
    bits = Budget.of_bpw(CHECKS[0])
    plan = make_plan(checkpoint.weights, bits, rules, sensitivities)
    types = {choice.weight: choice.format for choice in plan.choices}

    def decoded(weight):
        values, name = load(weight), types[weight.name]
        if name == "F32":
            return values
        columns = importance(calibration.inputs[weight.site.name]) if weight.site else None
        columns = columns[0] if columns is not None and values.ndim == 2 else columns
        return formats.dequantize(name, formats.quantize(name, values, columns, "fast"))

    base, candidate = build_model(checkpoint, EXPERTS), build_model(checkpoint, EXPERTS, decoded)
    with torch.inference_mode():
        scores = [
            score_row(base(input_ids=row[None]).logits[0], candidate(input_ids=row[None]).logits[0], row)
            for row in rows(2, seed=1).ids
        ]
    measured = float(torch.cat([score.kl for score in scores]).mean())
    assert plan.kl == pytest.approx(measured, rel=0.1 if sensitivities.root else 1.0)


def test_without_probes_tables_say_how_sensitive_a_weight_is(known, rules) -> None:
    found = measure(*known, None, PROBING)
    assert not found.measured and "tables" in found.source
    plan = preset_plan(known[0].weights, "Q3_K_M", rules, found)
    assert any("tables" in choice.reason for choice in plan.choices)
    assert min(bits_of(choice.format) for choice in plan.choices) >= 3.4


def test_a_measured_plan_may_go_below_the_preset(known, sensitivities, rules) -> None:
    """A weight that nothing depends on gets the fewest bits, whatever llama.cpp's rule says."""
    idle = find(known[0], "layers.0.attn_k").name
    table = dict(sensitivities.table) | {idle: dict.fromkeys(sensitivities.table[idle], 0.0)}
    plan = make_plan(known[0].weights, Budget.of_preset("Q4_K_M"), rules, replace(sensitivities, table=table))
    formats_of = {choice.weight: choice.format for choice in plan.choices}
    assert formats_of[idle] == "IQ1_S"
    assert plan.kl is not None and plan.kl > 0


def test_better_rounding_scales_formats(sensitivities) -> None:
    name = next(name for name, row in sensitivities.table.items() if "Q2_K" in row)
    better = sensitivities.after({"Q2_K": 0.5})
    assert better.table[name]["Q2_K"] == pytest.approx(sensitivities.table[name]["Q2_K"] / 2)
    assert better.table[name]["Q4_K"] == sensitivities.table[name]["Q4_K"]


def test_two_checks_are_met_by_a_line_and_a_root() -> None:
    for linear, root in ((0.8, 0.03), (1.2, 0.0), (0.0, 0.5)):
        checks = [(x, linear * x + root * sqrt(x)) for x in (0.4, 0.002)]
        assert fit(checks) == pytest.approx((linear, root), abs=1e-9)


def test_checks_that_no_root_meets_are_met_by_a_line_between() -> None:
    # The fine plan costs less than its sum says, unlike the coarse one: the opposite of what a root does.
    linear, root = fit([(0.4, 0.8), (0.002, 0.001)])
    assert root == 0 and 0.5 < linear < 2
    assert fit([(0.0, 0.0), (0.0, 0.0)]) == (1.0, 0.0)


def test_what_short_rows_do_not_feel_is_taken_from_tables(tiny) -> None:
    """An indexer that would choose among 2,048 tokens does nothing in rows of 64: it is not made worse for
    that."""
    exported = export(open_checkpoint(tiny("deepseek_v32")))
    checkpoint = exported.checkpoint
    found = measure(checkpoint, calibrate(checkpoint, rows(8)), rows(2, seed=1).ids, PROBING)
    plan = preset_plan(checkpoint.weights, "Q3_K_M", facts(exported), found)
    types = {choice.weight: choice.format for choice in plan.choices}
    indexers = [weight for weight in checkpoint.weights if weight.role is Role.INDEXER]
    assert len(indexers) == 6
    assert all(bits_of(types[weight.name]) > 4 for weight in indexers), types
