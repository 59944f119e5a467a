"""Coordinate descent that also knows what the loss makes of the outputs: tr(G E H Eᵀ).

G [out, out] is the Fisher of the layer's outputs, the mean of g gᵀ over tokens, g the gradient of the loss.
It couples the rows of E. With all other rows fixed, row r sees its own problem again, with another target:
G_rr · (e_r + c_r) H (e_r + c_r)ᵀ, c_r = Σ_s≠r G_rs e_s / G_rr. So a batch of rows descends at once, each
row as if the others stood still, and then those rows are accepted, one after another, that lower the
objective given what was accepted before them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moequant.formats.codebook import inverse
from moequant.rounding.descent import descend
from moequant.rounding.lattice import Fields, Lattice

BATCHES = 16
"""Into how many batches rows are dealt: the more, the fewer moves are made in ignorance of each other."""


def descend_two_sided(
    lattice: Lattice, target: Tensor, fields: Fields, hessian: Tensor, fisher: Tensor, rounds: int
) -> None:
    """Move `fields` towards target [E, in, R] under hessian [E, in, in] and fisher [E, R, R], in place."""
    rows = target.shape[2]
    error = target - lattice.value(fields)
    for _ in range(rounds):
        for first in range(min(BATCHES, rows)):
            batch = torch.arange(first, rows, BATCHES, device=target.device)
            old = fields.rows(batch)
            before = lattice.value(old)
            pull = error @ fisher[:, :, batch]
            weight = fisher.diagonal(dim1=1, dim2=2)[:, None, batch]
            new = old.copy()
            # Rows that the loss does not feel (weight 0) have their own value for a target, and stay.
            descend(lattice, before + pull * inverse(weight), new, hessian, 1)
            moved = before - lattice.value(new)
            kept = accepted(moved, pull, hessian, fisher[:, batch][:, :, batch])
            fields.put(batch, old.where(kept, new))
            error[:, :, batch] += torch.where(kept[:, None], moved, 0.0)


def accepted(moved: Tensor, pull: Tensor, hessian: Tensor, fisher: Tensor) -> Tensor:
    """bool [E, n]: which moves [E, in, n] of a batch are made; pull [E, in, n] is E G, fisher [E, n, n].

    Moving the rows by D changes the objective by tr(G D H Dᵀ) + 2 tr(D H Eᵀ G).
    """
    curved = hessian @ moved
    change = (curved * pull).sum(1) * 2
    coupling = fisher * (moved.mT @ curved)
    kept = torch.zeros_like(change, dtype=torch.bool)
    for r in range(change.shape[1]):
        alone = change[:, r] + coupling[:, r, r]
        kept[:, r] = alone < 0
        change += torch.where(kept[:, r, None], 2 * coupling[:, r], 0.0)
    return kept


def even_fisher(fisher: Tensor) -> Tensor:
    """f32 [E, out, out]: symmetric, mean diagonal 1."""
    mean = fisher.diagonal(dim1=1, dim2=2).mean(1)
    return ((fisher + fisher.mT) / (2 * mean[:, None, None])).float()
