"""The shared search of the grid formats, piece by piece, against brute force and gguf-py."""

from __future__ import annotations

import pytest
import torch
from gguf import quants

from moequant.formats import iq1, iq2, iq3
from moequant.formats.rows import (
    LISTED,
    Grid,
    Rows,
    Target,
    closest,
    closest_of,
    fold_signs,
    judge,
    keep,
    near_lists,
    nothing,
    points,
    steps_up,
)
from moequant.formats.signs import fill_parity, sign_values
from moequant.native import loops

GRIDS = pytest.mark.parametrize(
    "grid", [iq3.GRID_S, iq3.GRID_XXS, iq2.GRID_S, iq2.GRID_XS, iq2.GRID_XXS, iq1.GRID], ids=lambda g: g.name
)
CPU = torch.device("cpu")


def rows_of(grid: Grid, word: torch.Tensor) -> torch.Tensor:
    """Values of rows given as words, without delta, [..., group]."""
    return torch.stack([grid.low + grid.step * steps_up(grid, word, i) for i in range(grid.group)], -1)


@GRIDS
def test_words_hold_the_rows_of_gguf(grid: Grid) -> None:
    words = torch.cat([near.flatten() for near in near_lists(grid, 1, CPU)]).unique()
    assert torch.equal(rows_of(grid, words), points(grid.name)[(words >> 16).long()])


@GRIDS
def test_the_first_row_listed_is_the_nearest(grid: Grid) -> None:
    near = near_lists(grid, 1, CPU)[0]
    assert near.shape[0] == LISTED
    rows = points(grid.name)
    lowest = rows_of(grid, near[0, :1])[0]  # key 0: every weight at the lowest level
    distance = (rows - grid.low).square().sum(1)
    assert (lowest - grid.low).square().sum() == distance.min()


@GRIDS
def test_closest_loses_little_to_brute_force(grid: Grid) -> None:
    g = torch.Generator().manual_seed(0)
    top = grid.low + grid.step * grid.highest
    t = torch.randn(grid.group, 1, 400, generator=g) * top / 2
    t = t if grid.delta else t.abs()
    w = torch.rand(grid.group, 1, 400, generator=g) + 0.2
    one = torch.ones(400)
    for shift in {grid.delta, -grid.delta}:
        target = Target(one, one * shift)
        word, error = closest(t, w, grid, near_lists(grid, 1, CPU)[0], target, None)
        rows = points(grid.name) + shift
        brute = (w[:, 0].T[:, None] * (t[:, 0].T[:, None] - rows).square()).sum(2).min(1).values
        found = (w[:, 0].T * (t[:, 0].T - rows_of(grid, word[0]) - shift).square()).sum(1)
        stored = (w * t.square()).sum(0)[0]
        torch.testing.assert_close(error[0] * grid.step**2 + stored, found, rtol=1e-3, atol=1e-3)
        assert found.sum() <= 1.05 * brute.sum()
        assert (word >= 1 << 28).all() == (shift < 0)


@GRIDS
def test_all_at_once_is_one_by_one(grid: Grid) -> None:
    """What runs uncompiled makes its sums in the order of what is compiled."""
    g = torch.Generator().manual_seed(3)
    x, w = (torch.rand(grid.group, 4, 96, generator=g) for _ in range(2))
    x, near = (x - 0.5 if grid.delta else x) * 3, near_lists(grid, 1, CPU)[0]
    target, found = Target(torch.full((96,), 1.1), torch.full((96,), -grid.delta)), None
    for _ in range(2):
        found = closest.function(x, w, grid, near, target, found)
        assert all(map(torch.equal, found, closest(x, w, grid, near, target, found)))
    best = nothing(x, 4, 96)
    for step in (None, torch.full((96,), 0.7)):
        assert all(
            map(
                torch.equal,
                judge.function(x, w, grid, found[0], step, best),
                judge(x, w, grid, found[0], step, best),
            )
        )


@GRIDS
@pytest.mark.parametrize("lists", [1, 3])
def test_loops_find_the_same_rows(grid: Grid, lists: int) -> None:
    g = torch.Generator().manual_seed(4)
    x, w = (torch.rand(grid.group, 4, 101, generator=g) for _ in range(2))
    x, near = (x - 0.5 if grid.delta else x) * 3, near_lists(grid, lists, CPU)
    inverse = torch.full((101,), 1.1)
    inverse[7] = 0
    target, found = Target(inverse, torch.full((101,), -grid.delta)), None
    for each in near:
        found = closest(x, w, grid, each, target, found)
    assert found is not None
    other = closest_of(grid, near, x, w, target, None)
    same = found[0] == other[0]
    assert float(same.float().mean()) > 0.99  # of two as good, sums in another order may choose the other
    torch.testing.assert_close(other[1], found[1], rtol=1e-4, atol=1e-4)
    back = closest_of(grid, near[:1], x, w, Target(0.9 * inverse, target.shift), other)
    assert bool((back[1] <= other[1]).all()) and torch.equal(other[0][same], found[0][same])
    best = nothing(x, 4, 101)
    for step in (None, torch.full((101,), 0.7)):
        better, a, b, saved = judge(x, w, grid, other[0], step, best)
        kept = keep(x, w, grid, other[0], step, best)
        word = torch.where(better, other[0], best.word)
        known = Rows(word, a, b, saved)
        assert torch.equal(kept.word, known.word)
        torch.testing.assert_close(kept[1:], known[1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("even", [False, True])
def test_loops_fold_the_same_signs(even: bool) -> None:
    g = torch.Generator().manual_seed(6)
    x, w = torch.randn(8, 3, 67, generator=g), torch.rand(8, 3, 67, generator=g) + 0.1
    x[:, 1, 4] = 0
    native = loops(CPU)
    assert native is not None
    assert all(map(torch.equal, native.fold_signs(x, w, even), fold_signs(x, w, even)))


def test_signs_are_made_even_at_the_cheapest_weight() -> None:
    x = torch.randn(8, 300, generator=torch.Generator().manual_seed(1))
    w = torch.rand(8, 300, generator=torch.Generator().manual_seed(2)) + 0.1
    y, bits = fold_signs(x, w, True)
    signs = sign_values(bits.to(torch.uint8)[:, None]).T
    assert torch.equal(y * signs, x)
    assert bool((signs.prod(0) == 1).all())
    flipped = y < 0
    assert torch.equal(flipped.any(0), (x < 0).sum(0) % 2 == 1)
    assert torch.equal(flipped.int().argmax(0)[flipped.any(0)], (w * x.abs()).argmin(0)[flipped.any(0)])


def test_the_eighth_sign_is_that_of_gguf() -> None:
    table = torch.frombuffer(bytearray(quants.IQ2_XXS.ksigns), dtype=torch.uint8)
    assert torch.equal(fill_parity(torch.arange(128)), table)
