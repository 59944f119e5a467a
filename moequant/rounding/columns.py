"""Error feedback: every column is rounded to where the columns rounded before it left the outputs.

For an expert with weights W [out, in], rounded to Q, and the Hessian H of its inputs (sum of x xᵀ over
tokens), the outputs change by tr(E H Eᵀ), E = W - Q. With H = U D Uᵀ, U unit upper triangular, that is
the sum over columns k of D_k · (e_k + Σ_j<k e_j U_jk)²: rounding w_k + Σ_j<k e_j U_jk instead of w_k makes
every term as small as a rounding can (GPTQ, Frantar et al. 2022, in the form of LDLQ, Chee et al. 2023).

Block formats have scales to be found before codes. They are searched span by span when feedback reaches
them, by the format's own encoder, on weights that hold the feedback so far. Once scales stand, the columns
of a span may come in any order: those with the largest H_kk come first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moequant.formats.codebook import inverse
from moequant.native import WIDE, loops
from moequant.rounding.hessian import Factored, spans
from moequant.rounding.lattice import Fields, Lattice
from moequant.rounding.vectors import DOWN, EIGHT, Eights, nearest_points

CHUNK = 16
"""Columns whose feedback to each other torch applies one by one; farther ones get it in one product."""

Encode = Callable[[Tensor, int, int], Fields]
"""(weights f32 [E, columns, rows], first column, last column) -> the fields that the encoder finds."""


def feed(lattice: Lattice, target: Tensor, factored: Factored, encode: Encode) -> Fields:
    """target f32 [E, in, rows] rounded with feedback -> the fields of all its columns."""
    error, group = torch.empty_like(target), lattice.group  # the error is in the order of rounding
    found = []
    for begin, end in spans(lattice, target.shape[1]):
        order = factored.order[:, begin:end] - begin
        unit = factored.unit[:, begin:end, begin:end]
        weights = target[:, begin:end]
        pull = factored.unit[:, :begin, begin:end].mT @ error[:, :begin]
        fields = encode(weights + take(pull, order.argsort(1)), begin, end)
        span = Span(
            take(weights, order), pull, unit, factored.corner[:, begin // group : end // group], order
        )
        error[:, begin:end] = (
            _walk(lattice, span, fields) if group == 1 else _walk_groups(lattice, span, fields)
        )
        found.append(fields)
    return Fields(*(torch.cat(each, 1) for each in zip(*(f.all() for f in found), strict=True)))


def take(x: Tensor, order: Tensor) -> Tensor:
    """x [E, n, R] with the columns of each expert in order [E, n]."""
    experts, n = order.shape
    flat = order + torch.arange(experts, device=order.device)[:, None] * x.shape[1]
    return x.flatten(0, 1).index_select(0, flat.flatten()).view(experts, n, -1)


@dataclass(frozen=True, slots=True)
class Span:
    """The columns of a span in the order in which they are rounded.

    weights and pull (the feedback of earlier spans) f32 [E, n, R], unit and corner as in `Factored`,
    order i64 [E, n]: where the columns are.
    """

    weights: Tensor
    pull: Tensor
    unit: Tensor
    corner: Tensor
    order: Tensor


def _walk(lattice: Lattice, span: Span, fields: Fields) -> Tensor:
    """Round one column after another to the levels of its scales -> their errors [E, n, R], in order."""
    weights, unit, order = span.weights, span.unit, span.order
    by_sub, offset = lattice.step(fields), lattice.offset(fields)
    step, by = (take(lattice.spread(x, lattice.sub), order) for x in (by_sub, inverse(by_sub)))
    if offset is not None:
        weights = weights + take(lattice.spread(offset, lattice.sub), order)
    error, level = torch.empty_like(weights), torch.empty_like(weights)
    width = chunk_of(lattice, weights)
    for first in range(0, weights.shape[1], width):
        chunk = slice(first, first + width)
        wanted = weights[:, chunk] + span.pull[:, chunk] + unit[:, :first, chunk].mT @ error[:, :first]
        given = weights[:, chunk], wanted, step[:, chunk], by[:, chunk]
        walk(lattice, unit[:, chunk, chunk], given, level[:, chunk], error[:, chunk])
    fields.level.copy_(take(level, order.argsort(1)))
    return error


def chunk_of(lattice: Lattice, weights: Tensor) -> int:
    """How many columns of these weights [E, n, R] are rounded one by one before products follow."""
    return CHUNK if lattice.native is None or loops(weights.device) is None else WIDE


def walk(lattice: Lattice, unit: Tensor, given: tuple[Tensor, ...], level: Tensor, error: Tensor) -> None:
    """Round the columns of a chunk one after another, under unit f32 [E, n, n].

    `given` are weights, what they are rounded to with the feedback of all chunks before, steps and their
    inverses; level and error are written; f32 [E, n, R] each.
    """
    native = loops(level.device)
    if native is not None and lattice.native is not None:
        native.walk(lattice.native, unit, given, level, error)
    else:
        walk_by_torch(lattice, unit, given, level, error)


def walk_by_torch(
    lattice: Lattice, unit: Tensor, given: tuple[Tensor, ...], level: Tensor, error: Tensor
) -> None:
    """The same, computed by torch; it writes to what is wanted."""
    weights, wanted, step, by = given
    for k in range(wanted.shape[1]):
        near = lattice.snap(wanted[:, k] * by[:, k])
        left = torch.addcmul(weights[:, k], near, step[:, k], value=-1, out=error[:, k])
        level[:, k] = near
        wanted[:, k + 1 :].addcmul_(unit[:, k, k + 1 :, None], left[:, None])


def _walk_groups(lattice: Lattice, span: Span, fields: Fields) -> Tensor:
    """The same for vector formats, eight columns after eight."""
    layout, eights = lattice.layout, span.order[:, ::EIGHT] // EIGHT
    rows = EIGHT // layout.grid.group
    by_row = (eights[..., None] * rows + torch.arange(rows, device=eights.device)).flatten(1)
    step = take(lattice.spread(lattice.step(fields), lattice.sub // EIGHT), eights)
    row = take(fields.row, by_row)
    error, level = torch.empty_like(span.weights), torch.empty_like(span.weights)
    for g in range(eights.shape[1]):
        own, own_rows = slice(g * EIGHT, (g + 1) * EIGHT), slice(g * rows, (g + 1) * rows)
        back = span.unit[:, : own.start, own].mT @ error[:, : own.start]
        wanted = span.weights[:, own] + span.pull[:, own] + back
        down = row[:, own_rows.start] >= DOWN if layout.one_delta else None
        found = nearest_points(layout, Eights(wanted, step[:, g], span.corner[:, g], down))
        row[:, own_rows] = found.row
        level[:, own] = found.level
        error[:, own] = span.weights[:, own] - step[:, g, None] * level[:, own]
    fields.level.copy_(take(level, span.order.argsort(1)))
    fields.row.copy_(take(row, by_row.argsort(1)))
    return error
