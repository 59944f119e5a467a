"""Coordinate descent: scales, minima, d and codes moved one after another to where the outputs lose least.

With e the error of a row, moving its weights by δ changes e H eᵀ by δ H δᵀ - 2 δ g, g = H e. The gradient g
of a block is kept up to date, so every move is judged by the true objective and can only lower it:

1. each sub-block moves its scale and minimum code within REACH, levels fixed;
2. d and dmin are solved by least squares, levels fixed;
3. each level moves to the one nearest to where its column wants to be.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moequant.formats.codebook import inverse
from moequant.formats.parts import look_up
from moequant.native import loops
from moequant.rounding.columns import chunk_of
from moequant.rounding.lattice import Fields, Lattice
from moequant.rounding.vectors import DOWN, EIGHT, Eights, error_of, nearest_points

REACH = 2
"""How far a scale or minimum code may move in one round."""


def descend(lattice: Lattice, target: Tensor, fields: Fields, hessian: Tensor, rounds: int) -> None:
    """Move `fields` towards target f32 [E, in, R] under hessian f32 [E, in, in], in place."""
    error = target - lattice.value(fields)
    for _ in range(rounds):
        for begin in range(0, target.shape[1], lattice.block):
            end = begin + lattice.block
            gradient = hessian[:, begin:end] @ error
            block = lattice.block_of(fields, begin)
            within = hessian[:, begin:end, begin:end]
            move_steps(lattice, block, within, gradient)
            if lattice.group == 1:
                move_levels(lattice, block, within, gradient)
            else:
                move_groups(lattice, block, within, gradient)
            error[:, begin:end] = target[:, begin:end] - lattice.value(block)


def move_steps(lattice: Lattice, block: Fields, hessian: Tensor, gradient: Tensor) -> None:
    """Scales and minima of a block, then its d and dmin, in place; `gradient` follows."""
    native = loops(gradient.device)
    if native is not None and lattice.native_steps is not None:
        moved = block.scale, block.minimum, block.d, block.dmin
        native.move_steps(lattice.native_steps, hessian, block.level, gradient, moved)
    else:
        move_steps_by_torch(lattice, block, hessian, gradient)


def move_steps_by_torch(lattice: Lattice, block: Fields, hessian: Tensor, gradient: Tensor) -> None:
    """The same, computed by torch."""
    if len(lattice.scale_codes) > 1:
        move_scales(lattice, block, hessian, gradient)
    if lattice.moves_d:
        solve_steps(lattice, block, hessian, gradient)


def move_scales(lattice: Lattice, block: Fields, hessian: Tensor, gradient: Tensor) -> None:
    """Each sub-block's scale and minimum to the best codes within REACH; `gradient` follows."""
    sub = lattice.sub
    reach = torch.arange(-REACH, REACH + 1, device=hessian.device)[:, None, None]
    moved = torch.empty_like(gradient)
    for s in range(block.scale.shape[1]):
        columns = slice(s * sub, (s + 1) * sub)
        own, level = hessian[:, columns, columns], block.level[:, columns]
        g = _follow(gradient, hessian, moved, columns)
        scales = (block.scale[:, s] + reach).clamp_(lattice.scale_codes[0], lattice.scale_codes[-1])
        grown = block.d[:, 0] * (look_up(lattice.scales, scales) - look_up(lattice.scales, block.scale[:, s]))
        change = grown * (grown * (level * (own @ level)).sum(1) - 2 * (level * g).sum(1))
        if lattice.minima:
            minima, lifted, saved = _best_minima(lattice, block, s, own, g, grown)
            change = change + saved
        change[REACH] = change[REACH].clamp_max(0) if lattice.minima else 0.0
        best = _first_least(change)
        block.scale[:, s] = scales.gather(0, best)[0]
        torch.mul(grown.gather(0, best).movedim(0, 1), level, out=moved[:, columns])
        if lattice.minima:
            block.minimum[:, s] = minima.gather(0, best)[0]
            moved[:, columns] -= lifted.gather(0, best).movedim(0, 1)
    gradient.baddbmm_(hessian, moved, alpha=-1)


def _first_least(change: Tensor) -> Tensor:
    """i64 [1, E, R]: which of [k, E, R] is least, the first of equal ones. torch's argmin takes many times as
    long along the first of three dimensions."""
    least, at = change[0], torch.zeros_like(change[0])
    for k, other in enumerate(change[1:].unbind(), 1):
        at.masked_fill_(other < least, k)
        least = torch.minimum(least, other)
    return at[None].long()


def _follow(gradient: Tensor, hessian: Tensor, moved: Tensor, columns: slice) -> Tensor:
    """The gradient [E, n, R] of some columns after those before them have `moved` [E, n, R]."""
    before = slice(0, columns.start)
    return torch.baddbmm(gradient[:, columns], hessian[:, columns, before], moved[:, before], alpha=-1)


def _best_minima(
    lattice: Lattice, block: Fields, s: int, own: Tensor, gradient: Tensor, grown: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """For scales grown by `grown` [k, E, R]: the best minima, how much they lift the offset, the change.

    A lift of v changes the error by v² r - 2 v (grown · q - sum g), r = 1ᵀH1, q = 1ᵀHl; the first is solved
    for v, and minima count up by one.
    """
    minimum, dmin = block.minimum[:, s], block.dmin[:, 0]
    across = own.sum(1)
    level = block.level[:, s * lattice.sub : (s + 1) * lattice.sub]
    pull = grown * (across[:, None] @ level)[:, 0] - gradient.sum(1)
    curve = across.sum(1)[:, None]
    wanted = (pull * inverse(curve * dmin)).round_().clamp_(-REACH, REACH)
    minima = (minimum + wanted).clamp_(0, len(lattice.minima) - 1)
    lift = dmin * (minima - minimum)
    return minima, lift, lift * (lift * curve - 2 * pull)


def solve_steps(lattice: Lattice, block: Fields, hessian: Tensor, gradient: Tensor) -> None:
    """d and dmin [E, 1, R] of least error, as blocks hold them, where that lowers it; `gradient` follows."""
    unit = lattice.scaled(look_up(lattice.scales, block.scale), block.level)
    h_unit = hessian @ unit
    uu, ug = (unit * h_unit).sum(1, keepdim=True), (unit * gradient).sum(1, keepdim=True)
    alone = lattice.storable(block.d + ug * inverse(uu)) - block.d
    best = alone * (alone * uu - 2 * ug)
    grown = torch.where(best < 0, alone, 0.0)
    if lattice.minima:
        low, by_sub = look_up(lattice.minima, block.minimum), (len(unit), -1, lattice.sub, unit.shape[2])
        h_low = hessian.reshape(*hessian.shape[:2], -1, lattice.sub).sum(3) @ low
        uv, vg, vv = ((low * x.view(by_sub).sum(2)).sum(1, keepdim=True) for x in (h_unit, gradient, h_low))
        det = uu * vv - uv * uv
        by = torch.where(det > 1e-6 * uu * vv, 1 / det, 0.0)
        both = lattice.storable(block.d + (ug * vv - vg * uv) * by) - block.d
        lift = lattice.storable(block.dmin + (ug * uv - vg * uu) * by) - block.dmin
        change = both * (both * uu - 2 * ug - 2 * lift * uv) + lift * (lift * vv + 2 * vg)
        won = change < best.clamp_max(0)
        grown, lift = torch.where(won, both, grown), torch.where(won, lift, 0.0)
        block.dmin.add_(lift)
        gradient.addcmul_(h_low, lift)
    block.d.add_(grown)
    gradient.addcmul_(h_unit, grown, value=-1)


def move_levels(lattice: Lattice, block: Fields, hessian: Tensor, gradient: Tensor) -> None:
    """Each column's level to the one nearest to its optimum, the others fixed, one column after another."""
    by_sub = lattice.step(block)
    step, by = (lattice.spread(x, lattice.sub) for x in (by_sub, inverse(by_sub)))
    by = by * inverse(hessian.diagonal(dim1=1, dim2=2))[..., None]
    moved, width = torch.empty_like(gradient), chunk_of(lattice, gradient)
    for first in range(0, step.shape[1], width):
        chunk = slice(first, first + width)
        given = _follow(gradient, hessian, moved, chunk), step[:, chunk], by[:, chunk]
        move(lattice, hessian[:, chunk, chunk], given, block.level[:, chunk], moved[:, chunk])


def move(lattice: Lattice, hessian: Tensor, given: tuple[Tensor, ...], level: Tensor, moved: Tensor) -> None:
    """Move the levels of a chunk, one column after another, under hessian f32 [E, n, n].

    `given` are gradients that know what all chunks before have moved, steps, and what a gradient of 1 moves a
    level by; level is changed and moved, what weights move by, is written; f32 [E, n, R] each.
    """
    native = loops(level.device)
    if native is not None and lattice.native is not None:
        native.move(lattice.native, hessian, given, level, moved)
    else:
        move_by_torch(lattice, hessian, given, level, moved)


def move_by_torch(
    lattice: Lattice, hessian: Tensor, given: tuple[Tensor, ...], level: Tensor, moved: Tensor
) -> None:
    """The same, computed by torch; it writes to the gradients."""
    pull, step, by = given
    for k in range(pull.shape[1]):
        near = lattice.snap(torch.addcmul(level[:, k], pull[:, k], by[:, k]))
        change = torch.mul(near - level[:, k], step[:, k], out=moved[:, k])
        pull[:, k + 1 :].addcmul_(hessian[:, k, k + 1 :, None], change[:, None], value=-1)
        level[:, k] = near


def move_groups(lattice: Lattice, block: Fields, hessian: Tensor, gradient: Tensor) -> None:
    """The same for vector formats: eight columns at once to the best grid points near their optimum."""
    experts, n = gradient.shape[:2]
    layout, rows = lattice.layout, EIGHT // lattice.layout.grid.group
    step = lattice.spread(lattice.step(block), lattice.sub // EIGHT)
    own = hessian.reshape(experts, n // EIGHT, EIGHT, n // EIGHT, EIGHT).diagonal(dim1=1, dim2=3)
    own = own.permute(0, 3, 1, 2)
    corner = torch.linalg.cholesky(own.flip(2, 3)).flip(2, 3)
    undo, moved = torch.linalg.inv(own), torch.empty_like(gradient)
    for g in range(n // EIGHT):
        columns = slice(g * EIGHT, (g + 1) * EIGHT)
        level, row = block.level[:, columns], block.row[:, g * rows : (g + 1) * rows]
        by = step[:, g, None]
        wanted = by * level + undo[:, g] @ _follow(gradient, hessian, moved, columns)
        down = row[:, 0] >= DOWN if layout.one_delta else None
        eights = Eights(wanted, step[:, g], corner[:, g], down)
        found = nearest_points(layout, eights)
        won = (found.error < error_of(eights, level))[:, None]
        change = torch.where(won, found.level - level, 0.0)
        torch.mul(by, change, out=moved[:, columns])
        level += change
        row.copy_(torch.where(won, found.row, row))
