"""Search for types that store weight = scale · code - minimum, code in 0..top.

What is minimised is the error of the weights themselves, at every step:

1. Each sub-block tries several ranges, rounds its codes, and solves the weighted least
   squares for (scale, minimum) in closed form; the best survives.
2. Around that optimum the error is a quadratic form. Many (d, dmin) pairs are tried on it,
   each with its integer scales rounded first and its minima rounded given those.
3. Coordinate descent: each sub-block moves its integer (scale, minimum) among their eight
   neighbours by the true error, then (d, dmin) are solved in closed form with codes fixed.

ggml chooses scales and minima apart, by the error of the scales, and never looks back.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moequant.formats.base import Effort
from moequant.formats.layout import from_lanes, half, positive_half, to_lanes


@dataclass(frozen=True, slots=True)
class Affine:
    """Sub-blocks of `sub` weights, codes 0..top, integer scales and minima 0..top_scale (0: f16 themselves)."""

    sub: int
    top: int
    top_scale: int = 0


@dataclass(frozen=True, slots=True)
class AffineFit:
    """codes u8 [n, block], scale and minimum u8 [n, sub-blocks], d and dmin f32 [n] that f16 holds exactly."""

    codes: Tensor
    scale: Tensor
    minimum: Tensor
    d: Tensor
    dmin: Tensor


@dataclass(frozen=True, slots=True)
class _Plan:
    """How hard to look: ranges a side, refits of the best, (d, dmin) starts descended, sweeps each."""

    ranges: int
    refits: int
    starts: int
    sweeps: int


_PLANS: dict[Effort, _Plan] = {
    "fast": _Plan(ranges=2, refits=1, starts=1, sweeps=1),
    "default": _Plan(ranges=3, refits=1, starts=1, sweeps=2),
    "best": _Plan(ranges=6, refits=2, starts=5, sweeps=4),
}
_NEIGHBOURS = tuple((i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if i or j)


def search(grid: Affine, x: Tensor, w: Tensor, effort: Effort) -> AffineFit:
    """The best super-blocks found for x [n, block] under weights w."""
    plan = _PLANS[effort]
    xt, wt = to_lanes(x, grid.sub), to_lanes(w, grid.sub, 1.0)
    s, m = _fit_sub_blocks(grid, plan, xt, wt)
    form = _quadratic(grid, xt, wt, s, m)
    best: tuple[Tensor, ...] | None = None
    for i in range(plan.starts):
        d, dmin = _choose_steps(grid, form, s, m, i)
        scale, minimum = _round_scales(grid, form, s, m, d, dmin)
        for _ in range(plan.sweeps):
            scale, minimum, d, dmin, e = _sweep(grid, xt, wt, scale, minimum, d, dmin)
        best = _keep(best, (e, scale, minimum, d, dmin))
    assert best is not None
    _, scale, minimum, d, dmin = best
    codes = _codes(xt, d * scale, dmin * minimum, grid.top)
    n = len(x)
    return AffineFit(
        from_lanes(codes, n).to(torch.uint8),
        from_lanes(scale, n).to(torch.uint8),
        from_lanes(minimum, n).to(torch.uint8),
        from_lanes(d, n)[:, 0],
        from_lanes(dmin, n)[:, 0],
    )


def search_block(grid: Affine, x: Tensor, w: Tensor, effort: Effort) -> AffineFit:
    """Blocks without sub-blocks: (d, dmin) are the scale and the minimum, which may have either sign."""
    plan = _PLANS[effort]
    xt, wt = to_lanes(x, grid.sub), to_lanes(w, grid.sub, 1.0)
    s, m = _fit_sub_blocks(grid, plan, xt, wt)
    s, m = positive_half(s), half(m)
    codes = _codes(xt, s, m, grid.top)
    n = len(x)
    none = torch.empty((n, 0), dtype=torch.uint8, device=x.device)
    return AffineFit(
        from_lanes(codes, n).to(torch.uint8), none, none, from_lanes(s, n)[:, 0], from_lanes(m, n)[:, 0]
    )


def _keep(best: tuple[Tensor, ...] | None, new: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Of two tuples whose first member is an error, the better one block by block."""
    if best is None:
        return new
    better = new[0] < best[0]
    return tuple(torch.where(better, a, b) for a, b in zip(new, best, strict=True))


def _inverse(s: Tensor) -> Tensor:
    return torch.where(s > 0, 1 / s, torch.zeros_like(s))


def _codes(x: Tensor, s: Tensor, m: Tensor, top: int) -> Tensor:
    """Nearest codes, f32 like x [tiles, sub-blocks, weights, LANES]; s and m without the third."""
    return ((x + m.unsqueeze(-2)) * _inverse(s).unsqueeze(-2)).round().clamp(0, top)


def _error(x: Tensor, w: Tensor, s: Tensor, m: Tensor, top: int) -> Tensor:
    """Weighted squared error of each sub-block with nearest codes, [tiles, sub-blocks, LANES]."""
    r = x + m.unsqueeze(-2) - s.unsqueeze(-2) * _codes(x, s, m, top)
    # w * (r * r), not w * r * r: inductor keeps the first in one loop.
    return (w * (r * r)).sum(-2)


def _solve(grid: Affine, x: Tensor, w: Tensor, s: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, minimum) of least weighted error for the codes nearest under (s, m)."""
    c = _codes(x, s, m, grid.top)
    wc = w * c
    w1, wx, wc1, wcc, wcx = w.sum(-2), (w * x).sum(-2), wc.sum(-2), (wc * c).sum(-2), (wc * x).sum(-2)
    det = w1 * wcc - wc1 * wc1
    solvable = det > 1e-6 * w1 * wcc
    det = torch.where(solvable, det, 1.0)
    scale = (w1 * wcx - wx * wc1) / det
    minimum = (wc1 * wcx - wcc * wx) / det
    if grid.top_scale:
        through_zero = wcx / wcc.clamp_min(1e-38)
        scale = torch.where(minimum > 0, scale, through_zero)
        minimum = minimum.clamp_min(0)
    solvable = solvable & (scale > 0)
    return torch.where(solvable, scale, s), torch.where(solvable, minimum, m)


def _fit_sub_blocks(grid: Affine, plan: _Plan, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """The best unquantized (scale, minimum) of each sub-block, [tiles, sub-blocks, LANES]."""
    low, high = x.amin(-2), x.amax(-2)
    if grid.top_scale:
        low = low.clamp_max(0)
    shares = torch.linspace(0.8, 1.05, plan.ranges).tolist()
    middle = (low + high) / 2 if not grid.top_scale else torch.zeros_like(low)
    best: tuple[Tensor, ...] | None = None
    for a in shares:
        for b in shares:
            lo, hi = middle + (low - middle) * a, middle + (high - middle) * b
            s, m = _solve(grid, x, w, (hi - lo).clamp_min(0) / grid.top, -lo)
            best = _keep(best, (_error(x, w, s, m, grid.top), s, m))
    assert best is not None
    for _ in range(plan.refits):
        s, m = _solve(grid, x, w, best[1], best[2])
        best = _keep(best, (_error(x, w, s, m, grid.top), s, m))
    return best[1], best[2]


def _quadratic(grid: Affine, x: Tensor, w: Tensor, s: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(p, q, r): leaving (s, m) by (ds, dm) with codes fixed costs p·ds² - 2·q·ds·dm + r·dm²."""
    c = _codes(x, s, m, grid.top)
    wc = w * c
    return (wc * c).sum(-2), wc.sum(-2), w.sum(-2)


def _round_scales(
    grid: Affine, form: tuple[Tensor, Tensor, Tensor], s: Tensor, m: Tensor, d: Tensor, dmin: Tensor
) -> tuple[Tensor, Tensor]:
    """Integer scales nearest to s, then the minima that are best given them."""
    _, q, r = form
    scale = (s * _inverse(d)).round().clamp(0, grid.top_scale)
    moved = m + (d * scale - s) * q / r
    return scale, (moved * _inverse(dmin)).round().clamp(0, grid.top_scale)


def _choose_steps(
    grid: Affine, form: tuple[Tensor, Tensor, Tensor], s: Tensor, m: Tensor, start: int
) -> tuple[Tensor, Tensor]:
    """The (d, dmin) whose rounding costs least by the quadratic form, [tiles, 1, LANES] each."""
    p, q, r = form
    d0, dmin0 = s.amax(1, keepdim=True) / grid.top_scale, m.amax(1, keepdim=True) / grid.top_scale
    nudge = 1 + 0.013 * start
    best: tuple[Tensor, ...] | None = None
    for a in (0.9, 0.95, 1.0, 1.05, 1.1):
        for b in (0.9, 0.95, 1.0, 1.05, 1.1):
            d, dmin = d0 * (a * nudge), dmin0 * (b * nudge)
            scale, minimum = _round_scales(grid, form, s, m, d, dmin)
            ds, dm = d * scale - s, dmin * minimum - m
            cost = (p * ds * ds - 2 * q * ds * dm + r * dm * dm).sum(1, keepdim=True)
            best = _keep(best, (cost, d, dmin))
    assert best is not None
    return positive_half(best[1]), positive_half(best[2])


def _sweep(
    grid: Affine, x: Tensor, w: Tensor, scale: Tensor, minimum: Tensor, d: Tensor, dmin: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One descent over the integer scales, then (d, dmin) refitted; with the error of each super-block."""
    best: tuple[Tensor, ...] = (_error(x, w, d * scale, dmin * minimum, grid.top), scale, minimum)
    for i, j in _NEIGHBOURS:
        a, b = (scale + i).clamp(0, grid.top_scale), (minimum + j).clamp(0, grid.top_scale)
        best = _keep(best, (_error(x, w, d * a, dmin * b, grid.top), a, b)) or best
    error, scale, minimum = best
    error = error.sum(1, keepdim=True)
    new_d, new_dmin = _solve_steps(grid, x, w, scale, minimum, d, dmin)
    refitted = _error(x, w, new_d * scale, new_dmin * minimum, grid.top).sum(1, keepdim=True)
    better = refitted < error
    d, dmin = torch.where(better, new_d, d), torch.where(better, new_dmin, dmin)
    return scale, minimum, d, dmin, torch.where(better, refitted, error)


def _solve_steps(
    grid: Affine, x: Tensor, w: Tensor, scale: Tensor, minimum: Tensor, d: Tensor, dmin: Tensor
) -> tuple[Tensor, Tensor]:
    """(d, dmin) of least weighted error over the super-block with codes and integer scales fixed."""
    c = _codes(x, d * scale, dmin * minimum, grid.top)
    wc = w * c
    p, q, r = (wc * c).sum(-2), wc.sum(-2), w.sum(-2)
    xc, x1 = (wc * x).sum(-2), (w * x).sum(-2)
    uu, uv, vv = (
        t.sum(1, keepdim=True) for t in (p * scale * scale, q * scale * minimum, r * minimum * minimum)
    )
    xu, xv = (xc * scale).sum(1, keepdim=True), (x1 * minimum).sum(1, keepdim=True)
    det = uu * vv - uv * uv
    solvable = det > 1e-6 * uu * vv
    det = torch.where(solvable, det, 1.0)
    new_d, new_dmin = (xu * vv - xv * uv) / det, (xu * uv - xv * uu) / det
    # Without minima, or with minima that only follow the codes, one step is left to solve.
    new_d = torch.where(solvable, new_d, (xu + dmin * uv) / uu.clamp_min(1e-38))
    new_dmin = torch.where(solvable, new_dmin, dmin)
    good = (new_d > 0) & (new_dmin >= 0) & (uu > 0)
    return positive_half(torch.where(good, new_d, d)), positive_half(torch.where(good, new_dmin, dmin))
