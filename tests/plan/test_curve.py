"""The curve: from the smallest file to the largest, falling all the way, below llama.cpp's types."""

from __future__ import annotations

import pytest

from moequant.errors import PlanError
from moequant.plan import Budget, aligned, curve, packed_bytes, points, preset_points, prior_sensitivities
from moequant.plan.sensitivity import candidates
from tests.plan.test_choose import FACTS, layers

OVERHEAD = 10_000


@pytest.fixture(scope="module")
def sensitivities():
    return prior_sensitivities(layers(), 2)


def test_the_curve_falls_from_the_smallest_file_to_the_largest(sensitivities) -> None:
    found = curve(layers(), FACTS, sensitivities, OVERHEAD, steps=12)
    for point, choose in ((found[0], min), (found[-1], max)):
        sizes = [choose(aligned(packed_bytes(name, w)) for name in candidates(w)) for w in layers()]
        assert point.file_bytes == OVERHEAD + sum(sizes)
    assert [point.file_bytes for point in found] == sorted(point.file_bytes for point in found)
    kl = [point.predicted for point in found]
    assert kl == sorted(kl, reverse=True) and kl[-1] < kl[0] / 100


def test_points_are_the_budgets_asked_for(sensitivities) -> None:
    budgets = [Budget.of_size("600k"), Budget.of_bpw(3.0), Budget.of_preset("Q4_K_M")]
    found = points(layers(), FACTS, sensitivities, OVERHEAD, budgets)
    assert [point.label for point in found] == ["at most 600k", "at most 3 bits per weight", "Q4_K_M"]
    assert found[0].file_bytes <= 600_000
    with pytest.raises(PlanError, match="smallest possible file"):
        points(layers(), FACTS, sensitivities, OVERHEAD, [Budget.of_size("20k")])


def test_no_preset_beats_the_plan_of_its_size(sensitivities) -> None:
    found = preset_points(layers(), FACTS, sensitivities, OVERHEAD)
    assert {"IQ2_XXS", "Q2_K", "Q4_K_M", "Q8_0"} <= {theirs.label for theirs, _ in found}
    assert "Q4_0" not in {theirs.label for theirs, _ in found}, "no candidate, so not measured"
    for theirs, ours in found:
        assert ours.file_bytes <= theirs.file_bytes
        assert ours.predicted <= theirs.predicted * (1 + 1e-9)
