"""The nearest grid points of eight weights under a metric that knows their correlation.

Eight weights are rounded at once (as in GPTVQ, van Baalen et al. 2024): the candidates are the grid rows
that the format's own search would look at, with the signs of the weights and with one sign turned, and the
metric |(x - point) · corner|² decides among them. Where a row has four values, the second four make up for
what the first leave.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from moequant.formats.codebook import inverse
from moequant.formats.grids import Layout
from moequant.formats.rows import near_lists, points
from moequant.native import Grid, loops

EIGHT = 8
"""Weights that are rounded together: a byte of signs belongs to them."""

DOWN = 1 << 16
"""Bit of a row number (as `lattice.Fields` holds them) that says that its values are shifted down."""


@dataclass(frozen=True, slots=True)
class Eights:
    """Eight weights of R rows to be rounded: x f32 [E, 8, R], step f32 [E, R].

    corner f32 [E, 8, 8] is upper triangular; `down` bool [E, R] says where their shift is settled.
    """

    x: Tensor
    step: Tensor
    corner: Tensor
    down: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Groups:
    """The same, or four of them, as torch computes with them, rows first: x f32 [E, R, n].

    `odd` says whether the number of signs must be odd, None that it is free.
    """

    x: Tensor
    step: Tensor
    corner: Tensor
    down: Tensor | None = None
    odd: bool | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """level f32 [E, R, n] with signs and shift; row i32 [E, R, n / group]; error f32 [E, R] by the metric.

    What `nearest_points` gives is [E, 8, R] and [E, 8 / group, R].
    """

    level: Tensor
    row: Tensor
    error: Tensor

    def or_better(self, other: Found) -> Found:
        """The one of less error, row by row."""
        won = other.error < self.error
        return Found(
            torch.where(won[..., None], other.level, self.level),
            torch.where(won[..., None], other.row, self.row),
            torch.where(won, other.error, self.error),
        )


def nearest_points(layout: Layout, eights: Eights) -> Found:
    """The best points found for eight weights."""
    native, x = loops(eights.x.device), eights.x
    if native is None:
        return nearest_by_torch(layout, eights)
    found = Found(
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty((len(x), EIGHT // layout.grid.group, x.shape[2]), dtype=torch.int32),
        torch.empty_like(eights.step, memory_format=torch.contiguous_format),
    )
    down = None if eights.down is None else eights.down.float()
    given = x, eights.step, eights.corner
    native.nearest_points(_grid(layout), given, down, (found.level, found.row, found.error))
    return found


def nearest_by_torch(layout: Layout, eights: Eights) -> Found:
    """The same, computed by torch."""
    groups = Groups(eights.x.mT, eights.step, eights.corner, eights.down)
    found = _nearest(layout, groups)
    return Found(found.level.mT, found.row.mT, found.error)


def error_of(eights: Eights, level: Tensor) -> Tensor:
    """f32 [E, R]: the metric for those levels [E, 8, R]."""
    off = eights.x - eights.step[:, None] * level
    return (eights.corner.mT @ off).square().sum(1)


@cache
def _grid(layout: Layout) -> Grid:
    """The format as compiled loops take it."""
    grid, near = layout.grid, near_lists(layout.grid, 1, torch.device("cpu"))[0]
    kind = grid.group, grid.bits, grid.highest, layout.even, layout.signed
    return Grid(*kind, *near.shape, DOWN, grid.low, grid.step, grid.extra, grid.delta, near.data_ptr())


def _nearest(layout: Layout, groups: Groups) -> Found:
    if layout.grid.group == EIGHT:
        return _nearest_rows(layout, replace(groups, odd=False if layout.even else None))
    if not layout.even:
        return _nearest_pair(layout, groups)
    even, odd = (_nearest_pair(layout, replace(groups, odd=wanted)) for wanted in (False, True))
    return even.or_better(odd)


def _nearest_pair(layout: Layout, groups: Groups) -> Found:
    """Two rows of four: the second makes up for what the first leaves."""
    half, corner = layout.grid.group, groups.corner
    first = replace(groups, x=groups.x[..., :half], corner=corner[:, :half, :half])
    a = _nearest_rows(layout, first)
    left = (first.x - groups.step[..., None] * a.level) @ corner[:, :half, half:]
    last = corner[:, half:, half:]
    x = groups.x[..., half:] + torch.linalg.solve_triangular(last, left, upper=True, left=False)
    b = _nearest_rows(layout, replace(groups, x=x, corner=last))
    return Found(torch.cat([a.level, b.level], -1), torch.cat([a.row, b.row], -1), a.error + b.error)


def _nearest_rows(layout: Layout, groups: Groups) -> Found:
    """One row of the grid for each group."""
    if not layout.signed:
        usual, turned = (_best(layout, groups, signs, 0.0) for signs in _signs(groups))
        return usual.or_better(turned)
    delta, plus = layout.grid.delta, torch.ones_like(groups.x)
    up, down = _best(layout, groups, plus, delta), _best(layout, groups, plus, -delta)
    down = replace(down, row=down.row | DOWN)
    if groups.down is None:
        return up.or_better(down)
    never = torch.full_like(up.error, torch.inf)
    kept = replace(up, error=torch.where(groups.down, never, up.error))
    return kept.or_better(replace(down, error=torch.where(groups.down, down.error, never)))


def _signs(groups: Groups) -> tuple[Tensor, Tensor]:
    """Signs ±1 like x to be tried: of the weights, but for those that are cheapest to turn.

    To store v for -y instead of y costs 4·w·y·v, and v is about the same for all the small ones.
    """
    x = groups.x
    signs = torch.where(x < 0, -1.0, 1.0).float()
    weight = groups.corner.square().sum(-1)[:, None]
    cheapest = (weight * x.abs()).topk(2, -1, largest=False).indices

    def turn(signs: Tensor, which: int) -> Tensor:
        at = cheapest[..., which : which + 1]
        return signs.scatter(-1, at, -signs.gather(-1, at))

    first = turn(signs, 0)
    if groups.odd is None:
        return signs, first
    wrong = (((x < 0).sum(-1) % 2 == 1) != groups.odd)[..., None]
    return torch.where(wrong, first, signs), torch.where(wrong, turn(signs, 1), turn(first, 1))


def _best(layout: Layout, groups: Groups, signs: Tensor, shift: float) -> Found:
    """The best grid row with those signs and that shift."""
    grid = layout.grid
    near, values = _tables(layout, groups.x.device)
    t = groups.x * signs * inverse(groups.step)[..., None]
    c = ((t - (grid.low + shift)) / grid.step + 0.5).floor_().clamp_(0, grid.highest)
    base = (grid.highest + 1) ** torch.arange(grid.group - 1, -1, -1, device=t.device, dtype=torch.float32)
    rows = near[(c @ base).to(torch.int64)]  # [E, R, candidates]
    level = values[rows]
    if shift:
        level = level + shift
    level = level * signs[..., None, :]
    wide = level.flatten(1, 2)
    off = groups.x[:, :, None] - groups.step[..., None, None] * level
    error = (off.flatten(1, 2) @ groups.corner).square().sum(-1).view(rows.shape)
    least, at = error.min(-1)
    picked = at + torch.arange(at.shape[1], device=at.device) * rows.shape[-1]
    level = wide.gather(1, picked[..., None].expand(-1, -1, wide.shape[-1]))
    return Found(level, rows.gather(-1, at[..., None]).to(torch.int32), least)


@cache
def _tables(layout: Layout, device: torch.device) -> tuple[Tensor, Tensor]:
    """i64 [keys, candidates]: rows near to each key; f32 [rows, group]: their values."""
    near = near_lists(layout.grid, 1, device)[0]
    return (near >> 16 & 0xFFF).t().contiguous().to(torch.int64), points(layout.grid.name).to(device)
