"""The curve of a folder: it falls all the way, and no single scheme for all experts beats it."""

from __future__ import annotations

import pytest

from moequant.checkpoint import open_checkpoint
from moequant.containers.folders.container import FolderContainer
from moequant.containers.folders.plan import FolderSettings
from moequant.containers.gguf.sizes import Budget
from moequant.errors import PlanError
from moequant.plan.folder_curve import FolderPoints
from moequant.plan.folders import FolderMenu, bounds


@pytest.fixture(scope="module")
def found(tiny) -> FolderPoints:
    checkpoint = open_checkpoint(tiny("mixtral", num_hidden_layers=1, intermediate_size=2048))
    menu = FolderMenu.of(checkpoint, FolderSettings())
    known = menu.prior(checkpoint.weights, checkpoint.n_layers)
    return FolderPoints(menu, FolderContainer(checkpoint, FolderSettings()).size, known)


def test_the_curve_falls_from_the_smallest_folder_to_the_whole_one(found: FolderPoints) -> None:
    curve = found.curve(steps=12)
    sizes, kl = [point.file_bytes for point in curve], [point.predicted for point in curve]
    assert sizes == sorted(set(sizes)) and kl == sorted(kl, reverse=True) and kl[0] > kl[-1] == 0
    assert (sizes[0], sizes[-1]) == bounds(found.menu, found.size, found.known)
    with pytest.raises(PlanError, match=f"the smallest folder of .* has {sizes[0]:,} bytes of weights"):
        found.of([Budget.of_size(str(sizes[0] - 1))])


def test_no_scheme_for_all_experts_beats_the_plan_of_its_size(found: FolderPoints) -> None:
    uniform = found.uniform()
    assert {theirs.label for theirs, _ in uniform} == {scheme.name for scheme in found.menu.allowed}
    for theirs, ours in uniform:
        assert ours.file_bytes <= theirs.file_bytes and ours.predicted <= theirs.predicted
    assert any(ours.predicted < 0.9 * theirs.predicted for theirs, ours in uniform)
