"""Search for types that store weight = scale · code, code in low..high.

1. Each sub-block tries several scales of both signs (the code range is not symmetric, so the
   sign decides which tail gets the extra code), refits each in closed form, and keeps the best.
2. Several values of d are tried on the quadratic cost of rounding the sub-block scales.
3. Coordinate descent: each integer scale moves by one by the true error, then d is solved in
   closed form with codes fixed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moequant.formats.base import Effort
from moequant.formats.layout import from_lanes, half, to_lanes


@dataclass(frozen=True, slots=True)
class Symmetric:
    """Sub-blocks of `sub` weights, codes low..high, integer scales low_scale..high_scale (0: f16 themselves)."""

    sub: int
    low: int
    high: int
    low_scale: int = 0
    high_scale: int = 0


@dataclass(frozen=True, slots=True)
class SymmetricFit:
    """codes i8 [n, block], scale i8 [n, sub-blocks], d f32 [n] that f16 holds exactly."""

    codes: Tensor
    scale: Tensor
    d: Tensor


@dataclass(frozen=True, slots=True)
class _Plan:
    """How hard to look: scales tried per sign, refits of the best, values of d descended, sweeps each."""

    ranges: int
    refits: int
    starts: int
    sweeps: int


_PLANS: dict[Effort, _Plan] = {
    "fast": _Plan(ranges=3, refits=1, starts=1, sweeps=1),
    "default": _Plan(ranges=8, refits=1, starts=1, sweeps=2),
    "best": _Plan(ranges=24, refits=2, starts=7, sweeps=4),
}


def search(grid: Symmetric, x: Tensor, w: Tensor, effort: Effort) -> SymmetricFit:
    """The best super-blocks found for x [n, block] under weights w."""
    plan = _PLANS[effort]
    xt, wt = to_lanes(x, grid.sub), to_lanes(w, grid.sub, 1.0)
    s = _fit_sub_blocks(grid, plan, xt, wt)
    best: tuple[Tensor, ...] | None = None
    form = _curvature(grid, xt, wt, s)
    for i in range(plan.starts):
        d = _choose_step(grid, form, s, i)
        scale = _round_scales(grid, s, d)
        for _ in range(plan.sweeps):
            scale, d, e = _sweep(grid, xt, wt, scale, d)
        best = _keep(best, (e, scale, d))
    assert best is not None
    _, scale, d = best
    n = len(x)
    codes = from_lanes(_codes(grid, xt, d * scale), n).to(torch.int8)
    return SymmetricFit(codes, from_lanes(scale, n).to(torch.int8), from_lanes(d, n)[:, 0])


def search_block(grid: Symmetric, x: Tensor, w: Tensor, effort: Effort) -> SymmetricFit:
    """Blocks without sub-blocks: d, of either sign, is the scale."""
    xt, wt = to_lanes(x, grid.sub), to_lanes(w, grid.sub, 1.0)
    d = _signed_half(_fit_sub_blocks(grid, _PLANS[effort], xt, wt))
    n = len(x)
    codes = from_lanes(_codes(grid, xt, d), n).to(torch.int8)
    none = torch.empty((n, 0), dtype=torch.int8, device=x.device)
    return SymmetricFit(codes, none, from_lanes(d, n)[:, 0])


def _keep(best: tuple[Tensor, ...] | None, new: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    if best is None:
        return new
    better = new[0] < best[0]
    return tuple(torch.where(better, a, b) for a, b in zip(new, best, strict=True))


def _signed_half(x: Tensor) -> Tensor:
    """x rounded to f16, but never to zero unless it is zero: as f32."""
    tiny = torch.where(x > 0, 2.0**-24, torch.where(x < 0, -(2.0**-24), 0.0))
    near = half(x)
    return torch.where(near == 0, tiny, near)


def _inverse(s: Tensor) -> Tensor:
    return torch.where(s != 0, 1 / s, torch.zeros_like(s))


def _codes(grid: Symmetric, x: Tensor, s: Tensor) -> Tensor:
    return (x * _inverse(s).unsqueeze(-2)).round().clamp(grid.low, grid.high)


def _error(grid: Symmetric, x: Tensor, w: Tensor, s: Tensor) -> Tensor:
    """Weighted squared error of each sub-block with nearest codes, [tiles, sub-blocks, LANES]."""
    r = x - s.unsqueeze(-2) * _codes(grid, x, s)
    return (w * (r * r)).sum(-2)


def _solve(grid: Symmetric, x: Tensor, w: Tensor, s: Tensor) -> Tensor:
    """The scale of least weighted error for the codes nearest under s."""
    c = _codes(grid, x, s)
    wc = w * c
    wcc, wcx = (wc * c).sum(-2), (wc * x).sum(-2)
    return torch.where(wcc > 0, wcx / wcc.clamp_min(1e-38), s)


def _fit_sub_blocks(grid: Symmetric, plan: _Plan, x: Tensor, w: Tensor) -> Tensor:
    """The best unquantized scale of each sub-block, [tiles, sub-blocks, LANES]."""
    low, high = x.amin(-2), x.amax(-2)
    largest = torch.where(high > -low, high, low)
    best: tuple[Tensor, ...] | None = None
    for edge in (grid.low, grid.high):
        for share in torch.linspace(0.75, 1.1, plan.ranges).tolist():
            s = _solve(grid, x, w, largest * (share / edge))
            best = _keep(best, (_error(grid, x, w, s), s))
    assert best is not None
    for _ in range(plan.refits):
        s = _solve(grid, x, w, best[1])
        best = _keep(best, (_error(grid, x, w, s), s))
    return best[1]


def _curvature(grid: Symmetric, x: Tensor, w: Tensor, s: Tensor) -> Tensor:
    """p: moving the scale by ds with codes fixed costs p·ds²."""
    c = _codes(grid, x, s)
    return (w * (c * c)).sum(-2)


def _round_scales(grid: Symmetric, s: Tensor, d: Tensor) -> Tensor:
    return (s * _inverse(d)).round().clamp(grid.low_scale, grid.high_scale)


def _choose_step(grid: Symmetric, p: Tensor, s: Tensor, start: int) -> Tensor:
    """The d whose rounding of the scales costs least, [tiles, 1, LANES]."""
    low, high = s.amin(1, keepdim=True), s.amax(1, keepdim=True)
    d0 = torch.where(high > -low, high, low) / grid.low_scale
    best: tuple[Tensor, ...] | None = None
    for k in range(-6, 7):
        d = d0 * (1 + 0.015 * k + 0.005 * start)
        ds = d * _round_scales(grid, s, d) - s
        best = _keep(best, ((p * ds * ds).sum(1, keepdim=True), d))
    assert best is not None
    return _signed_half(best[1])


def _sweep(grid: Symmetric, x: Tensor, w: Tensor, scale: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One descent over the integer scales, then d refitted; with the error of each super-block."""
    best: tuple[Tensor, ...] = (_error(grid, x, w, d * scale), scale)
    for move in (-2, -1, 1, 2):
        a = (scale + move).clamp(grid.low_scale, grid.high_scale)
        best = _keep(best, (_error(grid, x, w, d * a), a))
    error, scale = best
    error = error.sum(1, keepdim=True)
    c = _codes(grid, x, d * scale)
    wc = w * c
    uu = ((wc * c).sum(-2) * scale * scale).sum(1, keepdim=True)
    xu = ((wc * x).sum(-2) * scale).sum(1, keepdim=True)
    new_d = _signed_half(torch.where(uu > 0, xu / uu.clamp_min(1e-38), d))
    refitted = _error(grid, x, w, new_d * scale).sum(1, keepdim=True)
    better = refitted < error
    return scale, torch.where(better, new_d, d), torch.where(better, refitted, error)
