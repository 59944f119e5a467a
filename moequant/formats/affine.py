"""Search for types that store weight = scale · code - minimum, code in 0..top.

What is minimised is the error of the weights themselves, at every step:

1. Each sub-block tries several ranges, rounds its codes, and solves the weighted least
   squares for (scale, minimum) in closed form; the best survives.
2. Around that optimum the error is a quadratic form, p·ds² - 2·q·ds·dm + r·dm². It prices the
   rounding of the scales for many values of d, then of the minima, moved by what their scale
   lost, for many values of dmin.
3. Coordinate descent: each sub-block moves its integer (scale, minimum) among their six
   neighbours by the true error, then (d, dmin) are solved in closed form with codes fixed.

ggml chooses scales and minima apart, by the error of the scales, and never looks back.
Tensors are laid out as `layout` says: weights [tiles, sub-blocks, weights, LANES], what belongs
to a sub-block [tiles, sub-blocks, LANES], to a super-block [tiles, 1, LANES].
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from moequant.formats.base import Effort
from moequant.formats.kernel import kernel
from moequant.formats.layout import better, clip, from_lanes, half, inverse, positive_half, storable, to_lanes
from moequant.formats.parts import Parts
from moequant.native import Affine as Native
from moequant.native import loops


@dataclass(frozen=True, slots=True)
class Affine:
    """Sub-blocks of `sub` weights, codes 0..top, integer scales and minima 0..top_scale (0: both are f16)."""

    sub: int
    top: int
    top_scale: int = 0
    steps: int = 33  # values of d, and of dmin, that are priced


@dataclass(frozen=True, slots=True)
class AffineFit:
    """codes u8 [n, block], scale and minimum u8 [n, sub-blocks], d and dmin f32 [n], exact in f16."""

    codes: Tensor
    scale: Tensor
    minimum: Tensor
    d: Tensor
    dmin: Tensor

    def parts(self) -> Parts:
        """The same as a block stores it."""
        d, dmin = (v.to(torch.float16)[:, None] for v in (self.d, self.dmin))
        return Parts(self.codes, self.scale, self.minimum, d, dmin)


@dataclass(frozen=True, slots=True)
class _Plan:
    """How hard to look.

    The first `ends` ways to span the codes are tried, the best is refitted `refits` times. (d, dmin)
    are chosen within `width` around each pair of `centers`, and each choice is swept `sweeps` times.
    """

    ends: int
    refits: int
    centers: tuple[float, ...]
    width: float
    sweeps: int


_PLANS: dict[Effort, _Plan] = {
    "fast": _Plan(ends=4, refits=0, centers=(1.0,), width=0.1, sweeps=1),
    "default": _Plan(ends=16, refits=1, centers=(1.0,), width=0.1, sweeps=1),
    "best": _Plan(ends=24, refits=2, centers=(0.88, 0.94, 1.0, 1.06, 1.12), width=0.03, sweeps=2),
}

# For each top code: how far inside the codes 0..top the least and the largest weight land (negative: beyond,
# so that they are clipped), most useful first. benchmarks/cases/landings.py makes such lists; of several for
# 2 bits, this one served super-blocks with outliers best.
_ENDS: dict[int, list[tuple[float, float]]] = {
    3: [
        (-0.28, -0.34),
        (-0.58, -0.04),
        (-0.04, -0.58),
        (-0.4, -0.16),
        (0.02, -0.94),
        (-0.94, -0.04),
        (0.14, -0.1),
        (-0.52, 0.5),
        (-0.82, -0.76),
        (0.02, 0.2),
        (-0.34, -0.82),
        (-1, -0.46),
        (0.26, -0.28),
        (-0.28, 0.32),
        (0.26, -1),
        (-1, 0.38),
        (-0.1, -0.1),
        (-0.16, -0.46),
        (-0.34, -1),
        (0.5, -0.82),
        (-0.94, 0.5),
        (-1, 0.08),
        (-0.64, -0.4),
        (-0.64, -0.82),
    ],
    15: [
        (-0.2, -0.2),
        (-0.5, 0.2),
        (0.1, -0.4),
        (-0.1, 0.9),
        (-0.1, 0.2),
        (0.1, -0.7),
        (0.2, 0),
        (0.9, 0.9),
        (-0.5, -0.2),
        (0.8, 0.1),
        (1.2, -0.2),
        (-1, -0.1),
        (-0.4, -0.7),
        (0.1, -1.2),
        (-0.1, -0.3),
        (1.1, 0.8),
        (0, 0.1),
        (-0.8, -0.6),
        (-0.4, -1.2),
        (0.7, 1),
        (-1.2, 0.1),
        (-0.4, 0.1),
        (1, -0.2),
        (0.4, -0.1),
    ],
    31: [
        (-0.1, -0.1),
        (0.8, -0.2),
        (0.2, -0.4),
        (-0.4, 0.1),
        (0.9, 0.9),
        (-0.1, 1.2),
        (1.2, -0.2),
        (0.1, -0.2),
        (1.2, 0.8),
        (0.8, 1.2),
        (-0.1, 0.2),
        (-0.8, 0.1),
        (0, -0.9),
        (0.1, 1),
        (-0.5, -0.6),
        (0.3, 0.2),
        (-0.7, -0.3),
        (0.7, 0.2),
        (-0.2, -0.7),
        (-1.2, -0.2),
        (1.2, 1.2),
        (-0.2, 0.4),
        (-0.3, -0.1),
        (1, 0.1),
    ],
}
# A larger scale wants a larger minimum: the two moves that take them apart hardly ever help.
_NEIGHBOURS = ((-1, -1), (-1, 0), (0, -1), (0, 1), (1, 0), (1, 1))


class _Moments(NamedTuple):
    """Of a sub-block: sum w, mean of x under w, sum w·(x - mean)², middle and half-width of its range."""

    total: Tensor
    mean: Tensor
    power: Tensor
    middle: Tensor
    reach: Tensor


class _SubFit(NamedTuple):
    """Error of a sub-block, unquantized scale and minimum, and p, q of the quadratic form (r is sum w)."""

    error: Tensor
    s: Tensor
    m: Tensor
    p: Tensor
    q: Tensor


class _SuperFit(NamedTuple):
    """Integer scales and minima as f32, the steps they multiply, and the error of the super-block."""

    error: Tensor
    scale: Tensor
    minimum: Tensor
    d: Tensor
    dmin: Tensor


def search(grid: Affine, x: Tensor, w: Tensor, effort: Effort) -> AffineFit:
    """The best super-blocks found for x [n, block] under weights w."""
    if (native := loops(x.device)) is not None:
        return AffineFit(*native.search_affine(_native(grid, x.shape[1], effort)[0], x, w))
    return search_by_torch(grid, x, w, effort)


def search_by_torch(grid: Affine, x: Tensor, w: Tensor, effort: Effort) -> AffineFit:
    """The same, computed by torch."""
    plan, n = _PLANS[effort], len(x)
    x, w = to_lanes(x, grid.sub), to_lanes(w, grid.sub, 1.0)
    moments, fit = _fit_sub_blocks(grid, plan, x, w)
    best: _SuperFit | None = None
    for factors in _factors(grid, plan, x.device):
        new = _round_scales(grid, x, moments, fit, factors)
        for _ in range(plan.sweeps):
            new = _refit_steps(grid, x, w, moments, _descend(grid, x, w, new))
        best = new if best is None else _SuperFit(*better(best, new))
    assert best is not None
    codes = _final_codes(x, inverse(best.d * best.scale), best.dmin * best.minimum, grid.top)
    return AffineFit(
        from_lanes(codes, n),
        from_lanes(best.scale, n).to(torch.uint8),
        from_lanes(best.minimum, n).to(torch.uint8),
        from_lanes(best.d, n)[:, 0],
        from_lanes(best.dmin, n)[:, 0],
    )


def search_block(grid: Affine, x: Tensor, w: Tensor, effort: Effort) -> AffineFit:
    """Blocks without sub-blocks: (d, dmin) are the scale and the minimum, which may have either sign."""
    if (native := loops(x.device)) is not None:
        return AffineFit(*native.search_affine(_native(grid, grid.sub, effort)[0], x, w))
    return search_block_by_torch(grid, x, w, effort)


def search_block_by_torch(grid: Affine, x: Tensor, w: Tensor, effort: Effort) -> AffineFit:
    """The same, computed by torch."""
    n = len(x)
    x, w = to_lanes(x, grid.sub), to_lanes(w, grid.sub, 1.0)
    _, fit = _fit_sub_blocks(grid, _PLANS[effort], x, w)
    s, m = positive_half(fit.s), half(fit.m)
    codes = from_lanes(_final_codes(x, inverse(s), m, grid.top), n)
    none = codes[:, :0]
    return AffineFit(codes, none, none, from_lanes(s, n)[:, 0], from_lanes(m, n)[:, 0])


def _fit_sub_blocks(grid: Affine, plan: _Plan, x: Tensor, w: Tensor) -> tuple[_Moments, _SubFit]:
    moments, error, m = _measure(grid, x, w)
    fit = _SubFit(error, torch.zeros_like(m), m, torch.zeros_like(m), torch.zeros_like(m))
    for lines in _lines(grid, plan, x.device):
        fit = _try_ranges(grid, x, w, moments, fit, lines)
    for _ in range(plan.refits):
        fit = _refit(grid, x, w, moments, fit)
    return moments, fit


@cache
def _factors(grid: Affine, plan: _Plan, device: torch.device) -> tuple[Tensor, ...]:
    """[2, steps] for every pair of centers: what the natural d and dmin are multiplied with, to be priced."""
    around = torch.linspace(-plan.width, plan.width, grid.steps, dtype=torch.float32, device=device)
    pairs = torch.tensor(list(product(plan.centers, repeat=2)), dtype=torch.float32, device=device)
    return (pairs[..., None] + around).unbind()


@cache
def _lines(grid: Affine, plan: _Plan, device: torch.device) -> tuple[Tensor, ...]:
    """(slope, offset) [4, 2] each: codes of a sub-block as lines over -1..1, its range."""
    ends = torch.tensor(_ENDS[grid.top][: plan.ends], dtype=torch.float32, device=device)
    low, high = ends[:, 0], grid.top - ends[:, 1]
    return torch.stack([(high - low) / 2, (high + low) / 2], 1).tensor_split(len(ends) // 4)


@cache
def _native(grid: Affine, block: int, effort: Effort) -> tuple[Native, tuple[Tensor, ...]]:
    """What compiled loops search, and the tables that it points to."""
    plan, device = _PLANS[effort], torch.device("cpu")
    lines, factors = torch.cat(_lines(grid, plan, device)), torch.stack(_factors(grid, plan, device))
    counts = block, grid.sub, grid.top, grid.top_scale, len(lines), plan.refits, len(factors), grid.steps
    tables = lines.contiguous(), factors.contiguous()
    return Native(*counts, plan.sweeps, *(each.data_ptr() for each in tables)), tables


def _codes(x: Tensor, s: Tensor, m: Tensor, top: int) -> Tensor:
    """Nearest codes, f32."""
    by = inverse(s)
    return clip((x * by.unsqueeze(-2) + (m * by).unsqueeze(-2)).round(), top)


def _error(x: Tensor, w: Tensor, s: Tensor, m: Tensor, top: int) -> Tensor:
    """Weighted squared error of each sub-block with nearest codes.

    Nine instructions a weight: what `_codes` and a subtraction would do, with the code counted from
    the top, constants kept per sub-block, and w * (r * r), which inductor fuses, not w * r * r.
    """
    by = inverse(s)
    from_top = torch.relu(top - torch.relu((x * by.unsqueeze(-2) + (m * by).unsqueeze(-2)).round()))
    r = x + (m - top * s).unsqueeze(-2) + s.unsqueeze(-2) * from_top
    return (w * (r * r)).sum(-2)


@kernel
def _measure(grid: Affine, x: Tensor, w: Tensor) -> tuple[_Moments, Tensor, Tensor]:
    """Moments, and the error and minimum of the fit with all codes 0, which any other must beat."""
    total = w.sum(-2)
    mean = (w * x).sum(-2) / total
    r = x - mean.unsqueeze(-2)
    power = (w * (r * r)).sum(-2)
    low, high = x.amin(-2), x.amax(-2)
    low = low.clamp_max(0) if grid.top_scale else low
    m = (-mean).clamp_min(0) if grid.top_scale else -mean
    off = m + mean
    return _Moments(total, mean, power, (low + high) / 2, (high - low) / 2), power + off * off * total, m


@kernel
def _try_ranges(
    grid: Affine, x: Tensor, w: Tensor, moments: _Moments, fit: _SubFit, lines: Tensor
) -> _SubFit:
    """`fit`, or a better one with codes slope · (x - middle) / reach + offset, for one of lines [4, 2]."""
    unit = (x - moments.middle.unsqueeze(-2)) * inverse(moments.reach).unsqueeze(-2)
    for slope, offset in lines.unbind():
        codes = clip((unit * slope + offset).round(), grid.top)
        fit = _SubFit(*better(fit, _solve(grid, x, w, moments, codes)))
    return fit


@kernel
def _refit(grid: Affine, x: Tensor, w: Tensor, moments: _Moments, fit: _SubFit) -> _SubFit:
    """`fit`, or a better one from the codes nearest under it."""
    return _SubFit(*better(fit, _solve(grid, x, w, moments, _codes(x, fit.s, fit.m, grid.top))))


def _solve(grid: Affine, x: Tensor, w: Tensor, moments: _Moments, c: Tensor) -> _SubFit:
    """The fit of least error among those with codes c; an infinite error when there is none."""
    wc = w * c
    p, q, b = (wc * c).sum(-2), wc.sum(-2), (wc * (x - moments.mean.unsqueeze(-2))).sum(-2)
    spread = p - q * q / moments.total
    scale = b / spread
    minimum = scale * q / moments.total - moments.mean
    error = moments.power - b * scale
    free = (spread > 1e-6 * p) & (scale > 0)
    if not grid.top_scale:
        return _SubFit(torch.where(free, error, torch.inf), scale, minimum, p, q)
    # A minimum cannot be negative: then it is 0, and the scale is solved alone.
    free = free & (minimum >= 0)
    b0 = b + moments.mean * q
    scale0 = b0 / p
    error0 = moments.power + moments.mean * moments.mean * moments.total - b0 * scale0
    error = torch.where(free, error, torch.where((p > 0) & (b0 > 0), error0, torch.inf))
    return _SubFit(error, torch.where(free, scale, scale0), torch.where(free, minimum, 0.0), p, q)


@kernel
def _round_scales(grid: Affine, x: Tensor, moments: _Moments, fit: _SubFit, factors: Tensor) -> _SuperFit:
    """Integer scales and minima, with the steps that make rounding them cheapest by the quadratic form."""
    shift = fit.q / moments.total
    d = _cheapest_step(grid, fit.p - fit.q * shift, fit.s, factors[0])
    scale = (fit.s * inverse(d)).round().clamp(0, grid.top_scale)
    moved = fit.m + (d * scale - fit.s) * shift
    dmin = _cheapest_step(grid, moments.total, moved.clamp_min(0), factors[1])
    minimum = (moved * inverse(dmin)).round().clamp(0, grid.top_scale)
    return _SuperFit(torch.full_like(d, torch.inf), scale, minimum, d, dmin)


def _cheapest_step(grid: Affine, price: Tensor, wanted: Tensor, factor: Tensor) -> Tensor:
    """The f16 step near factor · largest / top_scale of least sum(price · (step · integer - wanted)²)."""
    unit = (wanted.amax(1, keepdim=True) / grid.top_scale).unsqueeze(2)
    step = storable(unit * factor[:, None])  # [tiles, 1, steps, LANES]
    wanted = wanted.unsqueeze(2)
    lost = step * clip((wanted * inverse(step)).round(), grid.top_scale) - wanted
    cost = (price.unsqueeze(2) * (lost * lost)).sum(1, keepdim=True)
    return half(torch.where(cost <= cost.amin(2, keepdim=True), step, 0.0).amax(2))


@kernel
def _descend(grid: Affine, x: Tensor, w: Tensor, fit: _SuperFit) -> _SuperFit:
    """Each sub-block's integer scale and minimum moved to the best of their neighbours."""
    _, scale, minimum, d, dmin = fit
    best: tuple[Tensor, ...] = (_error(x, w, d * scale, dmin * minimum, grid.top), scale, minimum)
    for i, j in _NEIGHBOURS:
        a, b = (scale + i).clamp(0, grid.top_scale), (minimum + j).clamp(0, grid.top_scale)
        best = better(best, (_error(x, w, d * a, dmin * b, grid.top), a, b))
    return _SuperFit(best[0].sum(1, keepdim=True), best[1], best[2], d, dmin)


@kernel
def _refit_steps(grid: Affine, x: Tensor, w: Tensor, moments: _Moments, fit: _SuperFit) -> _SuperFit:
    """`fit`, or the same with (d, dmin) solved for its codes over the super-block where that is better."""
    _, scale, minimum, d, dmin = fit
    c = _codes(x, d * scale, dmin * minimum, grid.top)
    wc = w * c
    p, q, r = (wc * c).sum(-2), wc.sum(-2), moments.total
    uu, vv = (p * scale * scale).sum(1, keepdim=True), (r * minimum * minimum).sum(1, keepdim=True)
    uv = (q * scale * minimum).sum(1, keepdim=True)
    xu = ((wc * x).sum(-2) * scale).sum(1, keepdim=True)
    xv = (r * moments.mean * minimum).sum(1, keepdim=True)
    det = uu * vv - uv * uv
    both = det > 1e-6 * uu * vv
    # Without minima, or where they only follow the codes, d is left to solve alone.
    new_d = torch.where(both, (xu * vv - xv * uv) / det, (xu + dmin * uv) / uu)
    new_dmin = torch.where(both, (xu * uv - xv * uu) / det, dmin)
    good = (uu > 0) & (new_d > 0) & (new_dmin >= 0)
    new_d, new_dmin = (
        positive_half(torch.where(good, new_d, d)),
        positive_half(torch.where(good, new_dmin, dmin)),
    )

    def cost(d: Tensor, dmin: Tensor) -> Tensor:
        return d * (d * uu - 2 * (dmin * uv + xu)) + dmin * (dmin * vv + 2 * xv)

    error = fit.error + (cost(new_d, new_dmin) - cost(d, dmin))
    return _SuperFit(*better(fit, (error, scale, minimum, new_d, new_dmin)))


@kernel
def _final_codes(x: Tensor, inverse_s: Tensor, m: Tensor, top: int) -> Tensor:
    return ((x + m.unsqueeze(-2)) * inverse_s.unsqueeze(-2)).round().clamp(0, top).to(torch.uint8)
