"""Hessians made fit for rounding: damped until they factorise, or set aside with a reason."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moequant.rounding.lattice import Lattice

SPAN = 256
"""Columns whose scales are found group; also how far the order of columns is free."""


@dataclass(frozen=True, slots=True)
class Factored:
    """What rounding needs of the Hessians of some experts, all f32.

    damped [E, in, in], mean diagonal 1 before damping; order i64 [E, in], the columns of each span in the
    order they are rounded. In that order, H = unit · blocks(corner cornerᵀ) · unitᵀ: unit [E, in, in] is
    upper triangular with the identity on its diagonal, corner is [E, in / group, group, group].
    """

    damped: Tensor
    order: Tensor
    unit: Tensor
    corner: Tensor

    def of(self, experts: slice) -> Factored:
        """Those experts."""
        return Factored(self.damped[experts], self.order[experts], self.unit[experts], self.corner[experts])


def spans(lattice: Lattice, columns: int) -> list[tuple[int, int]]:
    """Ranges of whole blocks that cover all columns, about SPAN each."""
    width = max(1, SPAN // lattice.block) * lattice.block
    return [(i, min(i + width, columns)) for i in range(0, columns, width)]


def trouble(hessian: Tensor) -> list[str | None]:
    """For each of [E, in, in], why no rounding can be based on it; None where nothing is wrong."""
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    finite = torch.isfinite(hessian).flatten(1).all(1)
    reasons = (
        (~finite, "the Hessian is not finite"),
        ((diagonal < 0).any(1), "the Hessian has a negative diagonal"),
        (diagonal.sum(1) == 0, "no input was seen"),
    )
    found: list[str | None] = [None] * len(hessian)
    for bad, reason in reversed(reasons):
        for expert in bad.nonzero().flatten().tolist():
            found[expert] = reason
    return found


def factorise(lattice: Lattice, hessian: Tensor, damping: float) -> tuple[Factored, Tensor]:
    """Damped factors of [E, in, in], and the damping that each needed: f64 [E], in mean diagonals.

    Damping grows tenfold until the factorisation succeeds; infinity where 1 was not enough.
    """
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    even = (hessian / diagonal.mean(1)[:, None, None]).to(torch.float32)
    even = (even + even.mT) / 2
    order = _order(lattice, even.diagonal(dim1=1, dim2=2))
    # H = C Cᵀ with C upper triangular is a Cholesky factorisation with all columns taken backwards.
    backwards = order.flip(1)
    flipped = _permute(even, backwards)
    used = torch.full((len(hessian),), damping, dtype=torch.float64, device=hessian.device)
    while True:
        tried = flipped.clone()
        tried.diagonal(dim1=1, dim2=2).add_(used.clamp_max(1.0)[:, None].float())
        factor, info = torch.linalg.cholesky_ex(tried)
        failed = (info != 0) | ~torch.isfinite(factor).flatten(1).all(1)
        if not bool((failed & (used < 1)).any()):
            break
        used = torch.where(failed, (used * 10).clamp(1e-6, 1.0), used)
    even.diagonal(dim1=1, dim2=2).add_(used[:, None].float())
    upper = factor.flip(1, 2)
    unit, corner = _by_groups(upper, lattice.group)
    return Factored(even, order, unit, corner), torch.where(failed, torch.inf, used)


def _order(lattice: Lattice, diagonal: Tensor) -> Tensor:
    """i64 [E, in]: in each span the groups of largest diagonal first."""
    experts, columns = diagonal.shape
    group, parts = lattice.group, []
    for begin, end in spans(lattice, columns):
        size = diagonal[:, begin:end].reshape(experts, -1, group).sum(2)
        first = size.argsort(dim=1, descending=True, stable=True) * group + begin
        parts.append((first[..., None] + torch.arange(group, device=diagonal.device)).flatten(1))
    return torch.cat(parts, 1)


def _permute(matrix: Tensor, order: Tensor) -> Tensor:
    """[E, n, n] with rows and columns in order [E, n]."""
    return torch.stack([m[o][:, o] for m, o in zip(matrix, order, strict=True)])


def _by_groups(upper: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Upper triangular C [E, n, n] -> `unit` and `corner` of `Factored`."""
    experts, n = upper.shape[:2]
    corners = upper.reshape(experts, n // group, group, n // group, group)
    corner = corners.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).contiguous()
    if group == 1:
        return upper / corner[:, None, :, 0, 0], corner
    columns = upper.view(experts, n, n // group, group).transpose(1, 2)
    unit = torch.linalg.solve_triangular(corner, columns, upper=True, left=False)
    return unit.transpose(1, 2).reshape(experts, n, n), corner
