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
    finite = torch.stack([torch.isfinite(torch.stack(h.aminmax())).all() for h in hessian])
    reasons = "the Hessian is not finite", "the Hessian has a negative diagonal", "no input was seen"
    bad = torch.stack([~finite, (diagonal < 0).any(1), diagonal.sum(1) == 0], 1).tolist()
    return [next((reason for reason, is_so in zip(reasons, of, strict=True) if is_so), None) for of in bad]


def factorise(lattice: Lattice, hessian: Tensor, damping: float) -> tuple[Factored, Tensor]:
    """Damped factors of symmetric [E, in, in], and the damping that each needed: f64 [E], in mean diagonals.

    Damping grows tenfold until the factorisation succeeds; infinity where 1 was not enough.
    """
    experts, n = hessian.shape[:2]
    group, device = lattice.group, hessian.device
    order = _order(lattice, hessian.diagonal(dim1=1, dim2=2))
    damped, unit = (torch.empty((experts, n, n), dtype=torch.float32, device=device) for _ in range(2))
    corner = torch.empty((experts, n // group, group, group), dtype=torch.float32, device=device)
    used, failed = torch.full((experts,), damping, dtype=torch.float64), []
    for e in range(experts):  # one after another: what is in flight stays in the processor's cache
        torch.div(hessian[e], hessian[e].diagonal().mean(), out=damped[e])
        upper, info = _upper(_backwards(damped[e], order[e]), damping)
        unit[e], corner[e] = _by_groups(upper, group)
        failed.append(info)
    for e in torch.stack(failed).nonzero().flatten().tolist():  # few: a GPU is asked once for all
        upper, used[e] = _damped_more(_backwards(damped[e], order[e]), damping)
        unit[e], corner[e] = _by_groups(upper, group)
    damped.diagonal(dim1=1, dim2=2).add_(used.clamp(max=1).float().to(device)[:, None])
    return Factored(damped, order, unit, corner), used


def _backwards(even: Tensor, order: Tensor) -> Tensor:
    """A copy of [n, n] in `order`, from its last column to its first."""
    backwards = order.flip(0)
    return even.index_select(0, backwards).index_select(1, backwards)


def _upper(flipped: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """C upper triangular, C Cᵀ = the matrix [n, n] that is `flipped`, damped, which stays so; and whether
    there is none, not 0 then."""
    # That is a Cholesky factorisation with all columns taken backwards.
    flipped.diagonal().add_(damping)
    factor, info = torch.linalg.cholesky_ex(flipped)
    return factor.flip(0, 1), info


def _damped_more(flipped: Tensor, damping: float) -> tuple[Tensor, float]:
    """The same of what that damping is not enough for, and the damping that is."""
    flipped.diagonal().add_(damping)
    while damping < 1:
        more = min(max(damping * 10, 1e-6), 1.0)
        upper, info = _upper(flipped, more - damping)
        if not int(info):
            return upper, more
        damping = more
    return torch.eye(len(flipped), dtype=flipped.dtype, device=flipped.device), float("inf")


def _order(lattice: Lattice, diagonal: Tensor) -> Tensor:
    """i64 [E, in]: in each span the groups of largest diagonal first."""
    experts, columns = diagonal.shape
    group, parts = lattice.group, []
    for begin, end in spans(lattice, columns):
        size = diagonal[:, begin:end].reshape(experts, -1, group).sum(2)
        first = size.argsort(dim=1, descending=True, stable=True) * group + begin
        parts.append((first[..., None] + torch.arange(group, device=diagonal.device)).flatten(1))
    return torch.cat(parts, 1)


def _by_groups(upper: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Upper triangular C [n, n] -> `unit` [n, n] and `corner` [n / group, group, group] of `Factored`."""
    n = len(upper)
    corner = upper.view(n // group, group, n // group, group).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    if group == 1:
        return upper / upper.diagonal(), corner
    columns = upper.view(n, n // group, group).transpose(0, 1)
    unit = torch.linalg.solve_triangular(corner, columns, upper=True, left=False)
    return unit.transpose(0, 1).reshape(n, n), corner
