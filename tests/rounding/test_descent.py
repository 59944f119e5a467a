"""Every kind of move lowers the objective, and what it leaves cannot be lowered by the same move."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moequant.formats import FORMATS, Format
from moequant.rounding.descent import descend, move_groups, move_levels, move_scales, solve_steps
from moequant.rounding.lattice import Fields, Lattice, lattice_of
from tests.rounding.data import BLOCK_FORMATS, correlated

EVERY = pytest.mark.parametrize("fmt", BLOCK_FORMATS, ids=lambda f: f.name)


class Problem:
    """One block of 12 rows under the Hessian of correlated inputs, rounded by the format's encoder."""

    def __init__(self, fmt: Format) -> None:
        self.lattice = lattice_of(fmt)
        weights, hessian = correlated(2, 12, fmt.block, 3 * fmt.block)
        self.hessian = hessian / hessian.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
        self.target = weights.mT.contiguous()
        x = weights.reshape(-1, fmt.block)
        self.fields = self.lattice.read(fmt.encode(x, torch.ones_like(x), "fast").view(2, 12, -1))

    def errors(self) -> Tensor:
        """f64 [E, rows]: the objective of every row."""
        e = (self.target - self.lattice.value(self.fields)).double()
        return (e * (self.hessian.double() @ e)).sum(1)

    def gradient(self) -> Tensor:
        return self.hessian @ (self.target - self.lattice.value(self.fields))

    def moved(self, move: Callable[[Lattice, Fields, Tensor, Tensor], None]) -> Tensor:
        """Change of the objective by a move, f64 [E, rows]."""
        before, gradient = self.errors(), self.gradient()
        move(self.lattice, self.fields, self.hessian, gradient)
        if move in (move_scales, solve_steps):  # whose gradients the next move reads
            torch.testing.assert_close(
                gradient, self.gradient(), rtol=1e-3, atol=1e-4 * float(gradient.abs().max())
            )
        return (self.errors() - before) / before


@EVERY
def test_every_move_lowers_the_objective_of_every_row(fmt: Format) -> None:
    problem = Problem(fmt)
    lattice = problem.lattice
    levels = move_levels if lattice.group == 1 else move_groups
    moves = [levels]
    if lattice.moves_d:
        moves.insert(0, solve_steps)
    if len(lattice.scale_codes) > 1:
        moves.insert(0, move_scales)
    gained = []
    for move in moves * 3:
        change = problem.moved(move)
        assert change.max() < 1e-5, move
        gained.append(-float(change.mean()))
    assert sum(gained[: len(moves)]) > sum(gained[-len(moves) :]) >= 0  # less is left to gain every time


@EVERY
def test_codes_stay_what_the_format_can_write(fmt: Format) -> None:
    problem = Problem(fmt)
    descend(problem.lattice, problem.target * 3, problem.fields, problem.hessian, 3)
    value = problem.lattice.value(problem.fields)
    again = problem.lattice.read(problem.lattice.write(problem.fields))
    assert torch.equal(problem.lattice.value(again), value)


def test_steps_are_the_least_squares_solution() -> None:
    problem = Problem(FORMATS["Q4_K"])
    fields, hessian, target = problem.fields, problem.hessian.double(), problem.target.double()
    solve_steps(problem.lattice, fields, problem.hessian, problem.gradient())
    u = (fields.scale.repeat_interleave(32, 1) * fields.level).double()
    v = -fields.minimum.repeat_interleave(32, 1).double()
    for e in range(2):
        root = torch.linalg.cholesky(hessian[e]).T
        for r in range(12):
            a = torch.stack([root @ u[e, :, r], root @ v[e, :, r]], 1)
            best = torch.linalg.lstsq(a, (root @ target[e, :, r])[:, None]).solution[:, 0]
            torch.testing.assert_close(fields.d[e, 0, r].double(), best[0], rtol=2e-3, atol=0)
            torch.testing.assert_close(fields.dmin[e, 0, r].double(), best[1], rtol=2e-3, atol=0)


@pytest.mark.parametrize("name", ["Q2_K", "Q6_K"])
def test_scales_are_the_best_within_reach(name: str) -> None:
    """The last sub-block moves last, so nothing follows that could change what is best for it."""
    problem = Problem(FORMATS[name])
    lattice, fields = problem.lattice, problem.fields
    move_scales(lattice, fields, problem.hessian, problem.gradient())
    best = problem.errors()
    lowest, highest = lattice.scale_codes[0], lattice.scale_codes[-1]
    scale, minimum = fields.scale[:, -1].clone(), fields.minimum[:, -1:].clone()
    for i in (-1, 1):
        fields.scale[:, -1] = (scale + i).clamp(lowest, highest)
        assert (problem.errors() >= best * (1 - 1e-5)).float().mean() > 0.9  # 2 is the reach: further is free
        fields.scale[:, -1] = scale
        if lattice.minima:
            fields.minimum[:, -1:] = (minimum + i).clamp(0, len(lattice.minima) - 1)
            assert (problem.errors() >= best * (1 - 1e-5)).float().mean() > 0.9
            fields.minimum[:, -1:] = minimum


def test_levels_are_the_best_of_all_levels() -> None:
    """After a sweep, the last column's level is the best of all there are."""
    problem = Problem(FORMATS["IQ4_NL"])
    move_levels(problem.lattice, problem.fields, problem.hessian, problem.gradient())
    best = problem.errors()
    for level in problem.lattice.levels:
        problem.fields.level[:, -1] = level
        assert (problem.errors() >= best * (1 - 1e-5)).all()
