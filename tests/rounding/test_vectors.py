"""The grid points that are found, against all that there are."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from moequant.formats import FORMATS
from moequant.formats.grids import Layout
from moequant.formats.rows import points
from moequant.rounding.lattice import lattice_of
from moequant.rounding.vectors import DOWN, Eights, error_of, nearest_by_torch, nearest_points

NAMES = ["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"]


def all_points(layout: Layout) -> Tensor:
    """Every level that eight weights can have, f32 [points, 8]."""
    rows = points(layout.grid.name)
    if layout.grid.delta:
        return torch.cat([rows + layout.grid.delta, rows - layout.grid.delta])
    signs = torch.tensor(list(product((1.0, -1.0), repeat=8)))
    if layout.even:
        signs = signs[signs.prod(1) > 0]
    if layout.grid.group == 4:
        raise AssertionError("too many")
    return (signs[:, None] * rows).flatten(0, 1)


def eights(layout: Layout, n: int = 60) -> Eights:
    g = torch.Generator().manual_seed(2)
    mix = torch.randn(1, 8, 8, generator=g)
    corner = torch.linalg.cholesky(torch.eye(8) + 0.3 * mix @ mix.mT).mT.contiguous()
    x, step = (
        torch.randn(1, 8, n, generator=g),
        torch.full((1, n), 1.6 / float(points(layout.grid.name).max())),
    )
    return Eights(x, step, corner)


@pytest.mark.parametrize("name", ["IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S"])
def test_close_to_the_best_of_all_points(name: str) -> None:
    layout = lattice_of(FORMATS[name]).layout
    problem = eights(layout)
    every = all_points(layout)
    found = nearest_points(layout, problem)
    torch.testing.assert_close(found.error, error_of(problem, found.level))
    off = problem.x[0].T[:, None] - problem.step[0, 0] * every
    best = (off @ problem.corner[0]).square().sum(-1).amin(1)
    assert (found.error[0] >= best * (1 - 1e-4)).all()
    assert float(found.error.mean() / best.mean()) < 1.2  # for such strong correlation


@pytest.mark.parametrize("name", NAMES)
def test_points_exist(name: str) -> None:
    layout = lattice_of(FORMATS[name]).layout
    problem = eights(layout)
    found = nearest_points(layout, problem)
    values = points(layout.grid.name)[(found.row.mT & 0xFFF).long()].flatten(2).mT
    if layout.signed:
        shift = torch.where(found.row >= DOWN, -layout.grid.delta, layout.grid.delta)
        assert torch.equal(found.level, values + shift)
    else:
        assert torch.equal(found.level.abs(), values)
    if layout.even:
        assert ((found.level < 0).sum(1) % 2 == 0).all()


def test_a_settled_shift_stays() -> None:
    layout = lattice_of(FORMATS["IQ1_S"]).layout
    problem = eights(layout)
    down = torch.arange(60)[None] % 2 == 0
    found = nearest_points(layout, Eights(problem.x, problem.step, problem.corner, down))
    assert torch.equal(found.row[:, 0] >= DOWN, down)


@pytest.mark.parametrize("name", ["IQ3_S", "IQ3_XXS"])
def test_the_second_four_make_up_for_the_first(name: str) -> None:
    layout = lattice_of(FORMATS[name]).layout
    problem = eights(layout)
    blind = Eights(problem.x, problem.step, torch.eye(8)[None])
    assert (
        nearest_points(layout, problem).error.mean()
        < error_of(problem, nearest_points(layout, blind).level).mean()
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_loop_in_c_finds_what_torch_finds(name: str) -> None:
    layout = lattice_of(FORMATS[name]).layout
    one = eights(layout, 1003)  # the last vector of rows is not full
    x = torch.cat([one.x, 3 * one.x.flip(2)])
    x[0, :, 7], x[1, 3:, 9] = 0, 0
    step = one.step.repeat(2, 1) * torch.linspace(-1.5, 1.5, 1003)  # a step may be negative, and zero
    step[0, 5] = 0
    settled = torch.arange(2 * 1003).view(2, -1) % 3 == 0 if layout.one_delta else None
    problem = Eights(x, step, one.corner.repeat(2, 1, 1), settled)
    found, known = nearest_points(layout, problem), nearest_by_torch(layout, problem)
    same = (found.row == known.row).all(1) & (found.level == known.level).all(1)
    assert same.float().mean() > 0.995  # of two signs that cost the same either may be turned
    torch.testing.assert_close(found.error[same], known.error[same])
    assert found.error.sum() < 1.001 * known.error.sum()


@pytest.mark.parametrize("name", ["IQ1_S", "IQ2_XXS", "IQ3_S"])
def test_weights_may_lie_in_any_order(name: str) -> None:
    """Rows first, and one step for all rows."""
    layout = lattice_of(FORMATS[name]).layout
    one = eights(layout)
    turned = Eights(one.x.mT.contiguous().mT, one.step[:, :1].expand(-1, 60), one.corner.mT.contiguous().mT)
    found, known = nearest_points(layout, turned), nearest_points(layout, one)
    assert torch.equal(found.row, known.row) and torch.equal(found.level, known.level)
    assert torch.equal(found.error, known.error)
