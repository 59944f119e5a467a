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

import torch
from torch import Tensor

from moequant.formats.layout import inverse
from moequant.rounding.hessian import Factored, spans
from moequant.rounding.lattice import Fields, Lattice

CHUNK = 16
"""Columns whose feedback to each other is applied one by one; farther ones get it in one product."""

Encode = Callable[[Tensor, int, int], Fields]
"""(weights f32 [E, columns, rows], first column, last column) -> the fields that the encoder finds."""


def feed(lattice: Lattice, target: Tensor, factored: Factored, encode: Encode) -> Fields:
    """target f32 [E, in, rows] rounded with feedback -> the fields of all its columns."""
    error = torch.empty_like(target)  # in the order of rounding
    found = []
    for begin, end in spans(lattice, target.shape[1]):
        order = factored.order[:, begin:end] - begin
        unit = factored.unit[:, begin:end, begin:end]
        weights = target[:, begin:end]
        pull = factored.unit[:, :begin, begin:end].mT @ error[:, :begin]
        fields = encode(weights + take(pull, order.argsort(1)), begin, end)
        walk = _walk
        error[:, begin:end] = walk(lattice, take(weights, order), pull, unit, fields, order)
        found.append(fields)
    return Fields(*(torch.cat(each, 1) for each in zip(*(f.all() for f in found), strict=True)))


def take(x: Tensor, order: Tensor) -> Tensor:
    """x [E, n, R] with the columns of each expert in order [E, n]."""
    experts, n = order.shape
    flat = order + torch.arange(experts, device=order.device)[:, None] * x.shape[1]
    return x.flatten(0, 1).index_select(0, flat.flatten()).view(experts, n, -1)


def _walk(
    lattice: Lattice, weights: Tensor, pull: Tensor, unit: Tensor, fields: Fields, order: Tensor
) -> Tensor:
    """Round the columns of a span, in order, to the levels of its scales -> their errors.

    weights, pull (the feedback of earlier spans) [E, n, R] and unit [E, n, n] are in order; fields are not.
    """
    step = take(lattice.spread(lattice.step(fields), lattice.sub), order)
    by, offset = inverse(step), lattice.offset(fields)
    if offset is not None:
        weights = weights + take(lattice.spread(offset, lattice.sub), order)
    error, level = torch.empty_like(weights), torch.empty_like(weights)
    for first in range(0, weights.shape[1], CHUNK):
        chunk = slice(first, first + CHUNK)
        wanted = weights[:, chunk] + pull[:, chunk] + unit[:, :first, chunk].mT @ error[:, :first]
        across = unit[:, chunk, chunk]
        for k in range(wanted.shape[1]):
            at = first + k
            near = lattice.snap(wanted[:, k] * by[:, at])
            left = torch.addcmul(weights[:, at], near, step[:, at], value=-1, out=error[:, at])
            level[:, at] = near
            wanted[:, k + 1 :].addcmul_(across[:, k, k + 1 :, None], left[:, None])
    fields.level.copy_(take(level, order.argsort(1)))
    return error
