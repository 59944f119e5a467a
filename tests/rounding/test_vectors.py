"""The grid points that are found, against all that there are."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from moequant.formats import FORMATS
from moequant.formats.grids import Layout, points
from moequant.rounding.lattice import lattice_of
from moequant.rounding.vectors import DOWN, Groups, error_of, nearest_points

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


def groups(layout: Layout, n: int = 60) -> Groups:
    g = torch.Generator().manual_seed(2)
    mix = torch.randn(1, 8, 8, generator=g)
    corner = torch.linalg.cholesky(torch.eye(8) + 0.3 * mix @ mix.mT).mT.contiguous()
    x, step = (
        torch.randn(1, n, 8, generator=g),
        torch.full((1, n), 1.6 / float(points(layout.grid.name).max())),
    )
    return Groups(x, step, corner)


@pytest.mark.parametrize("name", ["IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S"])
def test_close_to_the_best_of_all_points(name: str) -> None:
    layout = lattice_of(FORMATS[name]).layout
    problem = groups(layout)
    every = all_points(layout)
    found = nearest_points(layout, problem)
    torch.testing.assert_close(found.error, error_of(problem, found.level))
    off = problem.x[0, :, None] - problem.step[0, 0] * every
    best = (off @ problem.corner[0]).square().sum(-1).amin(1)
    assert (found.error[0] >= best * (1 - 1e-4)).all()
    assert float(found.error.mean() / best.mean()) < 1.2  # for such strong correlation


@pytest.mark.parametrize("name", NAMES)
def test_points_exist(name: str) -> None:
    layout = lattice_of(FORMATS[name]).layout
    problem = groups(layout)
    found = nearest_points(layout, problem)
    values = points(layout.grid.name)[(found.row & 0xFFF).long()].flatten(2)
    if layout.signed:
        shift = torch.where(found.row >= DOWN, -layout.grid.delta, layout.grid.delta)
        assert torch.equal(found.level, values + shift)
    else:
        assert torch.equal(found.level.abs(), values)
    if layout.even:
        assert ((found.level < 0).sum(-1) % 2 == 0).all()


def test_a_settled_shift_stays() -> None:
    layout = lattice_of(FORMATS["IQ1_S"]).layout
    problem = groups(layout)
    down = torch.arange(60)[None] % 2 == 0
    found = nearest_points(layout, Groups(problem.x, problem.step, problem.corner, down))
    assert torch.equal(found.row[..., 0] >= DOWN, down)


@pytest.mark.parametrize("name", ["IQ3_S", "IQ3_XXS"])
def test_the_second_four_make_up_for_the_first(name: str) -> None:
    layout = lattice_of(FORMATS[name]).layout
    problem = groups(layout)
    blind = Groups(problem.x, problem.step, torch.eye(8)[None])
    assert (
        nearest_points(layout, problem).error.mean()
        < error_of(problem, nearest_points(layout, blind).level).mean()
    )
