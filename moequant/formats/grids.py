"""The search of the formats whose codes point into a grid: IQ3_*, IQ2_* and IQ1_*.

Weights come in groups of 4 or 8; a code names one grid point, a row of values. Sub-blocks of
16 or 32 weights have a scale d · level with an odd level. IQ3 and IQ2 store the signs apart.

The grid point nearest to a group under its importance is looked for in a short list: each
weight is rounded to a level by itself, which gives a key, and a table holds for each key the
points that lie closest. Weights are laid out [group, parts, m], m sub-blocks of `parts` groups,
so that all of it is elementwise over the sub-blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moequant.formats.base import Effort
from moequant.formats.codebook import Ladder, inverse, propose, ratio
from moequant.formats.layout import half
from moequant.formats.parts import VectorParts
from moequant.formats.rows import DOWN, Grid, Rows, Target, closest_of, fold_signs, keep, near_lists, nothing
from moequant.native import loops

# d of each round over that of the best before it: few levels leave valleys between good d.
NUDGES = (1.0, 1.0, 1.05, 0.95, 1.1)


@dataclass(frozen=True, slots=True)
class Layout:
    """A format's sub-blocks of `sub` weights, whose scales are d · unit · level."""

    grid: Grid
    sub: int
    unit: float
    ladder: Ladder
    # Where the largest weight of a sub-block may land, in highest values, most useful first: chosen greedily
    # for the least error over Gaussian and heavy tails, even and uneven importance.
    landings: tuple[float, ...]
    even: bool = False  # every 8 weights have an even number of signs
    signed: bool = False  # no signs are stored: the grid has negative values
    one_delta: bool = False  # a sub-block shifts all its groups the same way


@dataclass(frozen=True, slots=True)
class Budget:
    """How long to search: scales tried per sub-block, lists of near rows, rounds of levels and d.

    Where a sub-block shares one delta, both its signs are tried for the first `open_deltas` scales.
    """

    scales: int
    lists: int
    rounds: int
    open_deltas: int


class Wish(NamedTuple):
    """Scales [s, n] that sub-blocks want, the d [n] they are offered, their shift [s · n] if settled."""

    scale: Tensor
    d: Tensor
    shift: Tensor | None


class Fit(NamedTuple):
    """What a search ends with: d [n], level [S, n], words [parts, S, n], sign bits [sub / 8, S, n]."""

    d: Tensor
    level: Tensor
    word: Tensor
    signs: Tensor

    def parts(self) -> VectorParts:
        """The same as a block stores it, in the order of the weights."""
        eights = self.signs.shape[0]  # groups of four come as all low halves of eight, then the high ones
        ordered = self.word.reshape(-1, eights, *self.word.shape[1:]).permute(3, 2, 1, 0)
        return VectorParts(
            (ordered >> 16 & 0xFFF).flatten(1),
            self.signs.permute(2, 1, 0).flatten(1).to(torch.uint8),
            (ordered >= DOWN).flatten(1).to(torch.uint8),
            ((self.level.t().to(torch.int32) - 1) // 2).to(torch.uint8),
            self.d.to(torch.float16)[:, None],
        )


BUDGETS: dict[Effort, Budget] = {
    "fast": Budget(4, 1, 1, 1),
    "default": Budget(6, 1, 1, 2),
    "best": Budget(24, 4, 5, 24),
}


def nearest_rows(
    layout: Layout, lists: list[Tensor], x: Tensor, w: Tensor, inv: Tensor, shift: Tensor | None
) -> Tensor:
    """Words int32 [parts, m] of the rows nearest to x · inv under the importance w; inv, shift [m].

    With shift None the better direction is taken, by group or by sub-block as the layout says.
    """
    grid = layout.grid
    if shift is not None:
        return closest_of(grid, lists, x, w, Target(inv, shift), None)[0]
    delta = torch.full_like(inv, grid.delta)
    up = closest_of(grid, lists, x, w, Target(inv, delta), None)
    down = closest_of(grid, lists, x, w, Target(inv, -delta), None if layout.one_delta else up)
    return torch.where(down[1].sum(0) < up[1].sum(0), down[0], up[0]) if layout.one_delta else down[0]


def search(layout: Layout, x: Tensor, w: Tensor, effort: Effort) -> Fit:
    """x, w [n, 256] -> the fit with the least sum(w (x - q)²) that was found."""
    n, s = len(x), 256 // layout.sub
    budget, grid = BUDGETS[effort], layout.grid
    x, w = (v.view(n, s, layout.sub // 8, 8).permute(3, 2, 1, 0).contiguous() for v in (x, w))
    signs = torch.zeros_like(x[0], dtype=torch.int32)
    if not layout.signed:
        native = loops(x.device)
        x, signs = (fold_signs if native is None else native.fold_signs)(x, w, layout.even)
    x, w = (_split_groups(v, grid.group).flatten(2) for v in (x, w))
    lists = near_lists(grid, budget.lists, x.device)
    rows = _search_scales(layout, budget, lists, x, w)
    shift = None if grid.delta and not layout.one_delta else _settled(layout, rows)
    scale, curvature = ratio(rows.a, rows.b).view(s, n), rows.b.view(s, n)
    reach = torch.linspace(0.75, 1.0, 8, dtype=torch.float32, device=x.device) * layout.ladder.highest
    d = propose(x, scale, curvature, reach, layout.ladder)
    saved, best = torch.full_like(d, -torch.inf), Fit(d, scale, rows.word.view(-1, s, n), signs)
    for nudge in NUDGES[: budget.rounds]:
        d = half(d * nudge / layout.unit)
        level, rows = _search_levels(layout, lists, x, w, Wish(scale, d * layout.unit, shift))
        a, b = (rows.a.view(s, n) * level).sum(0), (rows.b.view(s, n) * level.square()).sum(0)
        refit = half(ratio(a, b) / layout.unit)
        for option in (d, refit):  # the rows stay as they are: d settles what they save
            step = option * layout.unit
            new = step * (2 * a - step * b)
            better = new > saved
            saved = torch.where(better, new, saved)
            found = Fit(option, level, rows.word.view(-1, s, n), signs)
            best = Fit(*(torch.where(better, p, q) for p, q in zip(found, best, strict=True)))
        d = best.d * layout.unit
    return best


def _split_groups(v: Tensor, group: int) -> Tensor:
    """[8, parts, ...] -> itself, or [4, 2 · parts, ...] with the low halves of all eights first."""
    return v if group == 8 else v.view(2, 4, *v.shape[1:]).transpose(0, 1).flatten(1, 2)


def _search_scales(layout: Layout, budget: Budget, lists: list[Tensor], x: Tensor, w: Tensor) -> Rows:
    """The rows of each sub-block at the best of the scales tried, x, w [group, parts, m]."""
    grid = layout.grid
    highest = grid.low + grid.step * grid.highest + grid.extra
    peak = inverse(x.abs().amax((0, 1))) * highest
    landings = layout.landings[: budget.scales]
    if budget.scales > len(landings):
        low, high = 0.6 * min(landings), 1.2 * max(landings)
        landings = tuple(low + (high - low) * i / (budget.scales - 1) for i in range(budget.scales))
    best = nothing(x, *x.shape[1:])
    shift = None if grid.delta else torch.zeros_like(peak)
    for i, landing in enumerate(landings):
        if layout.one_delta and i == budget.open_deltas:
            shift = _settled(layout, best)
        word = nearest_rows(layout, lists, x, w, peak * landing, shift)
        best = keep(x, w, grid, word, None, best)
    return best


def _settled(layout: Layout, rows: Rows) -> Tensor:
    """The shift [m] of rows that share one by sub-block."""
    delta = layout.grid.delta
    return torch.where(rows.word[0] < DOWN, delta, -delta).float()


def _search_levels(
    layout: Layout, lists: list[Tensor], x: Tensor, w: Tensor, wish: Wish
) -> tuple[Tensor, Rows]:
    """The best levels [s, n] near the wish, and their rows."""
    ladder, d = layout.ladder, wish.d
    middle = ladder.snap(wish.scale * inverse(d))
    level, best = middle, nothing(x, *x.shape[1:])
    for offset in (0, -ladder.step, ladder.step):
        option = (middle + offset).clamp(ladder.lowest, ladder.highest)
        step = (d * option).flatten()
        word = nearest_rows(layout, lists, x, w, inverse(step), wish.shift)
        new = keep(x, w, layout.grid, word, step, best)
        level = torch.where((new.saved > best.saved).view_as(level), option, level)
        best = new
    return level, best
