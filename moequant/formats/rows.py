"""Rows of grids: the nearest to a group of weights, what they lose, and the signs that are stored apart.

Weights are laid out [group, parts, m], m sub-blocks of `parts` groups, so that all of it is elementwise over
the sub-blocks. On a CPU loops in C do the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from gguf import quants
from torch import Tensor

from moequant.formats.codebook import ratio
from moequant.formats.kernel import kernel
from moequant.native import Grid as Native
from moequant.native import loops

LISTED = 8  # grid points a kernel compares at once
DOWN = 1 << 28


@dataclass(frozen=True, slots=True)
class Grid:
    """Rows of `group` values, each `low + step · c` with c = 0..highest; the highest has `extra` more.

    A row is held as a word: c of weight i in `bits` bits from bit i · bits, the row's number from
    bit 16. With a `delta`, all values of a group are shifted by it: up, or down if bit 28 is set.
    """

    name: str
    group: int
    bits: int
    highest: int
    low: float
    step: float
    extra: float = 0.0
    delta: float = 0.0


class Rows(NamedTuple):
    """Rows chosen for sub-blocks, as words int32 [parts, m]; what they save, f32 [m].

    a, b: sum(w·x·v) and sum(w·v²). At a scale s the rows save 2·s·a - s²·b of the error sum(w·x²).
    """

    word: Tensor
    a: Tensor
    b: Tensor
    saved: Tensor


@cache
def points(name: str) -> Tensor:
    """f32 [points, group]: the grid of gguf's class of that name."""
    source: Any = getattr(quants, name)
    source.init_grid()
    return torch.from_numpy(source.grid.reshape(source.grid_shape).astype("float32"))


class Target(NamedTuple):
    """What rows are compared with: x · inv less the shift of the row, each f32 [m]."""

    inv: Tensor
    shift: Tensor


@cache
def near_lists(grid: Grid, lists: int, device: torch.device) -> list[Tensor]:
    """Words of the rows nearest to each key, nearest first: `lists` tensors int32 [LISTED, keys].

    The key of a group: its c as digits, the first weight the most significant.
    """
    rows = points(grid.name)
    c = ((rows - grid.low) / grid.step).floor().to(torch.int32)
    places = torch.arange(grid.group, dtype=torch.int32, device="cpu") * grid.bits
    numbers = torch.arange(len(rows), dtype=torch.int32, device="cpu")
    words = (c << places).sum(1, dtype=torch.int32) | numbers << 16
    levels = grid.low + grid.step * torch.arange(grid.highest + 1, dtype=torch.float32, device="cpu")
    levels[-1] += grid.extra
    keys = torch.cartesian_prod(*[levels] * grid.group)
    near = words[torch.cdist(keys, rows).topk(LISTED * lists, largest=False).indices]
    return [part.contiguous().to(device) for part in near.t().view(lists, LISTED, -1)]


def native_grid(grid: Grid, near: Tensor | None) -> Native:
    """The grid as compiled loops take it, with a list of near rows."""
    listed, words = ((0, 0), None) if near is None else (near.shape, near.data_ptr())
    kind = grid.group, grid.bits, grid.highest, 0, 0
    return Native(*kind, *listed, DOWN, grid.low, grid.step, grid.extra, grid.delta, words)


def steps_up(grid: Grid, word: Tensor, i: int) -> Tensor:
    """(value - low) / step of weight i in rows given as words, without delta, f32."""
    c = (word >> (grid.bits * i) & ((1 << grid.bits) - 1)).to(torch.float32)
    return torch.where(c == grid.highest, c + grid.extra / grid.step, c) if grid.extra else c


@kernel
def closest(
    x: Tensor, w: Tensor, grid: Grid, near: Tensor, target: Target, found: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """x, w [group, parts, m] -> words, errors [parts, m] of the best rows: `found` or one of `near`.

    Of t = x · inv, the error is sum(w (t - row)²) less sum(w t²), over step².
    """
    inv, low = target.inv / grid.step, (target.shift + grid.low) / grid.step
    key = torch.zeros_like(x[0], dtype=torch.int32)
    start = torch.zeros_like(x[0])
    pull = []
    for xi, wi in zip(x.unbind(), w.unbind(), strict=True):
        t = xi * inv
        up = t - low
        key = key * (grid.highest + 1) + (up + 0.5).floor().clamp(0, grid.highest).to(torch.int32)
        pull.append(-2 * wi * up)
        start = start + wi * low * (low - 2 * t)  # what the row of nothing but `low` leaves
    word, least = torch.zeros_like(key), torch.full_like(start, torch.inf)
    for row in near.unbind():
        new, error = row[key], start
        for i, (wi, pi) in enumerate(zip(w.unbind(), pull, strict=True)):
            c = steps_up(grid, new, i)
            error = error + c * (wi * c + pi)
        better = error < least
        least = torch.where(better, error, least)
        word = torch.where(better, new, word)
    return _better(grid, target, (word, least), found)


@closest.uncompiled
def _closest_at_once(
    x: Tensor, w: Tensor, grid: Grid, near: Tensor, target: Target, found: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """`closest`, all weights of a group in one call."""
    inv, low = target.inv / grid.step, (target.shift + grid.low) / grid.step
    t = x * inv
    up = t - low
    pull = -2 * w * up
    key = torch.zeros_like(x[0], dtype=torch.int32)
    for digit in (up + 0.5).floor().clamp(0, grid.highest).to(torch.int32).unbind():
        key = key * (grid.highest + 1) + digit
    start = _in_turn(torch.zeros_like(x[0]), w * low * (low - 2 * t))
    word, least = torch.zeros_like(key), torch.full_like(start, torch.inf)
    for row in near.unbind():
        new = row.index_select(0, key.flatten()).view(key.shape)
        c = _all_steps_up(grid, new)
        error = _in_turn(start, c * (w * c + pull))
        better = error < least
        least = torch.where(better, error, least)
        word = torch.where(better, new, word)
    return _better(grid, target, (word, least), found)


def _better(
    grid: Grid, target: Target, new: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """The better rows of two choices, the new ones with the direction of their shift."""
    word, least = new
    if grid.delta:
        word = word | (target.shift < 0).to(torch.int32) * DOWN
    if found is None:
        return word, least
    better = least < found[1]
    return torch.where(better, word, found[0]), torch.where(better, least, found[1])


def _all_steps_up(grid: Grid, word: Tensor) -> Tensor:
    """`steps_up` of all weights of rows [parts, m], f32 [group, parts, m], out of a table."""
    places, table = _steps(grid, word.device)
    return table.index_select(0, (word >> places & len(table) - 1).flatten()).view(-1, *word.shape)


@cache
def _steps(grid: Grid, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the bits of the weights of a group begin, [group, 1, 1], and what `steps_up` makes of each c."""
    weights = torch.arange(grid.group, dtype=torch.int32, device=device)
    every = torch.arange(1 << grid.bits, dtype=torch.int32, device=device)
    return (grid.bits * weights).view(-1, 1, 1), steps_up(grid, every, 0)


def _in_turn(total: Tensor, rest: Tensor) -> Tensor:
    """The total with every one of the rest added, first to last."""
    for each in rest.unbind():
        total = total + each
    return total


@kernel
def judge(
    x: Tensor, w: Tensor, grid: Grid, word: Tensor, step: Tensor | None, best: Rows
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Whether the rows `word` save more than `best`, at the scale step [m] or, with None, at their best one.

    Gives bool [m] and a, b, saved of the better rows.
    """
    a = b = torch.zeros_like(x[0])
    low = grid.low + torch.where(word < DOWN, grid.delta, -grid.delta).float()
    for i in range(grid.group):
        v = low + grid.step * steps_up(grid, word, i)
        wv = w[i] * v
        a, b = a + wv * x[i], b + wv * v
    return _judged(a.sum(0), b.sum(0), step, best)


def _judged(a: Tensor, b: Tensor, step: Tensor | None, best: Rows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `judge` gives for rows of these sums."""
    scale = ratio(a.clamp_min(0), b) if step is None else step
    saved = scale * (2 * a - scale * b)
    better = saved > best.saved
    return (
        better,
        torch.where(better, a, best.a),
        torch.where(better, b, best.b),
        torch.where(better, saved, best.saved),
    )


@judge.uncompiled
def _judge_at_once(
    x: Tensor, w: Tensor, grid: Grid, word: Tensor, step: Tensor | None, best: Rows
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`judge`, all weights of a group in one call."""
    zero = torch.zeros_like(x[0])
    low = grid.low + torch.where(word < DOWN, grid.delta, -grid.delta).float()
    v = low + grid.step * _all_steps_up(grid, word)
    wv = w * v
    return _judged(_in_turn(zero, wv * x).sum(0), _in_turn(zero, wv * v).sum(0), step, best)


def keep(x: Tensor, w: Tensor, grid: Grid, word: Tensor, step: Tensor | None, best: Rows) -> Rows:
    """The better of `best` and the rows `word`, per sub-block; see `judge`."""
    # The words are picked outside: inside, the compiler would redo the sums for every part of a sub-block.
    if (native := loops(x.device)) is not None:
        known = native.judge(native_grid(grid, None), x, w, word)
        better, a, b, saved = _judged(*known, step, best)
    else:
        better, a, b, saved = judge(x, w, grid, word, step, best)
    return Rows(torch.where(better, word, best.word), a, b, saved)


def closest_of(
    grid: Grid, lists: list[Tensor], x: Tensor, w: Tensor, target: Target, found: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Words and errors [parts, m] of the best rows of all lists: `found`, or better ones."""
    if (native := loops(x.device)) is not None:
        if found is None:
            error = torch.full_like(x[0], torch.inf)
            found = torch.zeros_like(error, dtype=torch.int32), error
        else:
            found = found[0].clone(), found[1].clone()
        for near in lists:
            given = x, w, target.inv.contiguous()
            native.closest(native_grid(grid, near), given, target.shift.contiguous(), found)
        return found
    for near in lists:
        found = closest(x, w, grid, near, target, found)
    assert found is not None
    return found


def nothing(x: Tensor, parts: int, m: int) -> Rows:
    """The rows that anything is better than."""
    zero = torch.zeros(m, dtype=torch.float32, device=x.device)
    return Rows(torch.zeros(parts, m, dtype=torch.int32, device=x.device), zero, zero, zero - torch.inf)


@kernel
def fold_signs(x: Tensor, w: Tensor, even: bool) -> tuple[Tensor, Tensor]:
    """x, w [8, ...] -> sizes f32 [8, ...] to be matched by positive values, and sign bits int32 [...].

    With `even`, an odd group flips the sign of one weight, where that costs least: to store v for
    -y instead of y costs 4·w·y·v, and v is about the same for all the small ones.
    """
    negative, y = x < 0, x.abs()
    if even:
        odd = negative.sum(0) % 2 == 1
        cheapest = (w * y).argmin(0)
        flip = (torch.arange(8, device=x.device).view(-1, *[1] * odd.dim()) == cheapest) & odd
        negative, y = negative ^ flip, torch.where(flip, -y, y)
    bits = torch.zeros_like(x[0], dtype=torch.int32)
    for i, sign in enumerate(negative.unbind()):
        bits = bits | sign.to(torch.int32) << i
    return y, bits
