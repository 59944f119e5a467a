"""Search for types that store weight = scale · code, code in low..high, low < 0 < high.

1. Each sub-block puts its largest weight at several places of the code range, with both signs
   (the range is not symmetric: the sign decides which tail gets the extra code), solves the
   scale in closed form for the codes that follow, and keeps the best.
2. With codes fixed, moving a scale by ds costs p·ds²: that prices many values of d.
3. Coordinate descent: each integer scale moves by one by the true error, then d is solved in
   closed form with codes fixed.

Shapes are as in `affine`: [tiles, sub-blocks, weights, LANES], [tiles, sub-blocks, LANES] and
[tiles, 1, LANES].
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from moequant.formats.base import Effort
from moequant.formats.kernel import kernel
from moequant.formats.layout import better, from_lanes, half, inverse, signed_half, storable, to_lanes
from moequant.formats.parts import Parts
from moequant.native import Symmetric as Native
from moequant.native import loops


@dataclass(frozen=True, slots=True)
class Symmetric:
    """Sub-blocks of `sub` weights, codes low..high, integer scales low_scale..high_scale (0: f16)."""

    sub: int
    low: int
    high: int
    low_scale: int = 0
    high_scale: int = 0
    steps: int = 17  # values of d that are priced


@dataclass(frozen=True, slots=True)
class SymmetricFit:
    """codes i8 [n, block], scale i8 [n, sub-blocks], d f32 [n] that f16 holds exactly."""

    codes: Tensor
    scale: Tensor
    d: Tensor

    def parts(self, grid: Symmetric) -> Parts:
        """The same as a block stores it: codes and scales counted from their lowest."""
        codes = (self.codes.to(torch.int16) - grid.low).to(torch.uint8)
        scale = (self.scale.to(torch.int16) - grid.low_scale).to(torch.uint8)
        d = self.d.to(torch.float16)[:, None]
        return Parts(codes, scale, scale[:, :0], d, d[:, :0])


@dataclass(frozen=True, slots=True)
class _Plan:
    """How hard to look.

    The first `landings` are tried and `extra` evenly spread ones, the best refitted `refits` times; d is
    chosen within `width` around each of `centers`, and each choice swept `sweeps` times.
    """

    landings: int
    extra: int
    refits: int
    centers: tuple[float, ...]
    width: float
    sweeps: int


_PLANS: dict[Effort, _Plan] = {
    "fast": _Plan(landings=4, extra=0, refits=0, centers=(1.0,), width=0.1, sweeps=1),
    "default": _Plan(landings=12, extra=0, refits=1, centers=(1.0,), width=0.1, sweeps=1),
    "best": _Plan(
        landings=16, extra=64, refits=2, centers=(0.86, 0.93, 1.0, 1.07, 1.14), width=0.035, sweeps=2
    ),
}

# For each lowest code: where in the codes, before rounding, the weight of largest size lands, most useful
# first. benchmarks/cases/landings.py makes such lists; of several for 3 bits, this one served
# super-blocks with outliers best.
_LANDINGS: dict[int, list[float]] = {
    -4: [-4.2, -3.2, -5.1, -3.8, -4.6, 4, -5.3, -4, -3, -2.2, -3.4, -4.4, -4.8, -3.6, -2.6, -4.1],
    -8: [
        -8.16,
        7.14,
        -9.04,
        -7.84,
        -10.08,
        -8.56,
        6.09,
        -6.88,
        8.33,
        -7.36,
        -9.44,
        -10.4,
        -8.32,
        9.03,
        -8.8,
        -8,
    ],
    -16: [
        -16.16,
        -15.04,
        -14.08,
        -16.8,
        -15.84,
        -12.96,
        -17.76,
        -20.16,
        -12,
        -16.48,
        15.3,
        14.7,
        -13.76,
        -17.28,
        10.95,
        -18.56,
    ],
    -32: [
        -32,
        31,
        -29.12,
        30.07,
        26.97,
        -28.16,
        -24.96,
        26.04,
        -32.64,
        -23.04,
        -24,
        22.01,
        -31.68,
        -27.84,
        -28.8,
        -29.76,
    ],
    -127: [
        -127,
        -121.92,
        -125.73,
        -123.19,
        -118.11,
        -124.46,
        -120.65,
        -113.03,
        -119.38,
        -116.84,
        -115.57,
        -107.95,
        -114.3,
        -111.76,
        -109.22,
        -106.68,
    ],
}


class _SubFit(NamedTuple):
    """Error of a sub-block less sum(w·x²), its unquantized scale, and p = sum(w·code²)."""

    error: Tensor
    s: Tensor
    p: Tensor


class _SuperFit(NamedTuple):
    """Error of the super-block, integer scales as f32, and the step they multiply."""

    error: Tensor
    scale: Tensor
    d: Tensor


def search(grid: Symmetric, x: Tensor, w: Tensor, effort: Effort) -> SymmetricFit:
    """The best super-blocks found for x [n, block] under weights w."""
    if (native := loops(x.device)) is not None:
        return SymmetricFit(*native.search_symmetric(_native(grid, x.shape[1], effort)[0], x, w))
    return search_by_torch(grid, x, w, effort)


def search_by_torch(grid: Symmetric, x: Tensor, w: Tensor, effort: Effort) -> SymmetricFit:
    """The same, computed by torch."""
    plan, n = _PLANS[effort], len(x)
    x, w = to_lanes(x, grid.sub), to_lanes(w, grid.sub, 1.0)
    fit = _fit_sub_blocks(grid, plan, x, w)
    best: _SuperFit | None = None
    for factor in _factors(grid, plan, x.device):
        new = _round_scales(grid, x, fit, factor)
        for _ in range(plan.sweeps):
            new = _refit_step(grid, x, w, _descend(grid, x, w, new))
        best = new if best is None else _SuperFit(*better(best, new))
    assert best is not None
    codes = _final_codes(grid, x, inverse(best.d * best.scale))
    return SymmetricFit(
        from_lanes(codes, n), from_lanes(best.scale, n).to(torch.int8), from_lanes(best.d, n)[:, 0]
    )


def search_block(grid: Symmetric, x: Tensor, w: Tensor, effort: Effort) -> SymmetricFit:
    """Blocks without sub-blocks: d, of either sign, is the scale."""
    if (native := loops(x.device)) is not None:
        return SymmetricFit(*native.search_symmetric(_native(grid, grid.sub, effort)[0], x, w))
    return search_block_by_torch(grid, x, w, effort)


def search_block_by_torch(grid: Symmetric, x: Tensor, w: Tensor, effort: Effort) -> SymmetricFit:
    """The same, computed by torch."""
    n = len(x)
    x, w = to_lanes(x, grid.sub), to_lanes(w, grid.sub, 1.0)
    d = signed_half(_fit_sub_blocks(grid, _PLANS[effort], x, w).s)
    codes = from_lanes(_final_codes(grid, x, inverse(d)), n)
    return SymmetricFit(codes, codes[:, :0], from_lanes(d, n)[:, 0])


def land_block(grid: Symmetric, x: Tensor, w: Tensor, landings: tuple[float, ...]) -> SymmetricFit:
    """Blocks without sub-blocks, their largest weight at the best of a few places."""
    if (native := loops(x.device)) is not None:
        return SymmetricFit(*native.search_symmetric(_landing(grid, landings)[0], x, w))
    d, codes = _land(grid, x, w, torch.tensor(landings, dtype=torch.float32, device=x.device))
    return SymmetricFit(codes, codes[:, :0], d)


def _fit_sub_blocks(grid: Symmetric, plan: _Plan, x: Tensor, w: Tensor) -> _SubFit:
    largest = _measure(x)
    fit = _SubFit(
        torch.zeros_like(largest), torch.zeros_like(largest), torch.zeros_like(largest)
    )  # all codes 0
    for four in _landings(grid, plan, x.device):
        fit = _try_places(grid, x, w, largest, fit, four)
    for _ in range(plan.refits):
        fit = _refit(grid, x, w, fit)
    return fit


@cache
def _factors(grid: Symmetric, plan: _Plan, device: torch.device) -> tuple[Tensor, ...]:
    """[steps] for every center: what the natural d is multiplied with, to be priced."""
    around = torch.linspace(-plan.width, plan.width, grid.steps, dtype=torch.float32, device=device)
    return tuple(center + around for center in plan.centers)


@cache
def _landings(grid: Symmetric, plan: _Plan, device: torch.device) -> tuple[Tensor, ...]:
    """Codes for the largest weight, [4] each."""
    known = torch.tensor(_LANDINGS[grid.low][: plan.landings], dtype=torch.float32, device=device)
    spread = torch.linspace(0.6, 1.25, plan.extra // 2, dtype=torch.float32, device=device)
    landings = torch.cat([known, spread * grid.low, spread * grid.high])
    return landings.tensor_split(len(landings) // 4)


@cache
def _native(grid: Symmetric, block: int, effort: Effort) -> tuple[Native, tuple[Tensor, ...]]:
    """What compiled loops search, and the tables that it points to."""
    plan, device = _PLANS[effort], torch.device("cpu")
    landings, factors = torch.cat(_landings(grid, plan, device)), torch.stack(_factors(grid, plan, device))
    codes = grid.low, grid.high, grid.low_scale, grid.high_scale
    counts = block, grid.sub, *codes, len(landings), plan.refits, len(factors), grid.steps, plan.sweeps
    tables = landings.contiguous(), factors.contiguous()
    return Native(*counts, *(each.data_ptr() for each in tables)), tables


@cache
def _landing(grid: Symmetric, landings: tuple[float, ...]) -> tuple[Native, Tensor]:
    """The same for `land_block`."""
    table = torch.tensor(landings, dtype=torch.float32, device="cpu")
    codes = grid.low, grid.high, 0, 0
    return Native(grid.sub, grid.sub, *codes, len(table), 0, 0, 0, 0, table.data_ptr(), None), table


def _codes(grid: Symmetric, x: Tensor, inverse_s: Tensor) -> Tensor:
    """Nearest codes, f32; clamped by relu, as `layout.clip` explains."""
    above = torch.relu((x * inverse_s.unsqueeze(-2) - grid.low).round())
    return grid.high - torch.relu((grid.high - grid.low) - above)


def _error(grid: Symmetric, x: Tensor, w: Tensor, s: Tensor) -> Tensor:
    """Weighted squared error of each sub-block with nearest codes."""
    r = x - s.unsqueeze(-2) * _codes(grid, x, inverse(s))
    # w * (r * r), not w * r * r: inductor keeps the first in one loop.
    return (w * (r * r)).sum(-2)


@kernel
def _measure(x: Tensor) -> Tensor:
    """1 / the largest weight in size, with its sign."""
    low, high = x.amin(-2), x.amax(-2)
    return inverse(torch.where(high > -low, high, low))


@kernel
def _try_places(
    grid: Symmetric, x: Tensor, w: Tensor, largest: Tensor, fit: _SubFit, places: Tensor
) -> _SubFit:
    """`fit`, or a better one with the largest weight at one of four places, in units of codes."""
    for place in places.unbind():
        fit = _SubFit(*better(fit, _solve(x, w, _codes(grid, x, largest * place))))
    return fit


@kernel
def _refit(grid: Symmetric, x: Tensor, w: Tensor, fit: _SubFit) -> _SubFit:
    """`fit`, or a better one from the codes nearest under it."""
    return _SubFit(*better(fit, _solve(x, w, _codes(grid, x, inverse(fit.s)))))


def _solve(x: Tensor, w: Tensor, c: Tensor) -> _SubFit:
    """The fit of least error among those with codes c."""
    wc = w * c
    p, b = (wc * c).sum(-2), (wc * x).sum(-2)
    s = b * inverse(p)
    return _SubFit(-b * s, s, p)


@kernel
def _round_scales(grid: Symmetric, x: Tensor, fit: _SubFit, factor: Tensor) -> _SuperFit:
    """Integer scales, with the f16 step that makes rounding them cheapest."""
    low, high = fit.s.amin(1, keepdim=True), fit.s.amax(1, keepdim=True)
    # The largest takes the longer, negative side of the integers.
    sign = torch.where(high > -low, -1.0, 1.0).float()
    unit = (torch.maximum(high, -low) / -grid.low_scale).unsqueeze(2)
    size = storable(unit * factor[:, None])  # [tiles, 1, steps, LANES]
    step = size * sign.unsqueeze(2)
    wanted = fit.s.unsqueeze(2)
    lost = step * (wanted * inverse(step)).round().clamp(grid.low_scale, grid.high_scale) - wanted
    cost = (fit.p.unsqueeze(2) * (lost * lost)).sum(1, keepdim=True)
    d = sign * half(torch.where(cost <= cost.amin(2, keepdim=True), size, 0.0).amax(2))
    scale = (fit.s * inverse(d)).round().clamp(grid.low_scale, grid.high_scale)
    return _SuperFit(torch.full_like(d, torch.inf), scale, d)


@kernel
def _descend(grid: Symmetric, x: Tensor, w: Tensor, fit: _SuperFit) -> _SuperFit:
    """Each sub-block's integer scale moved to the best of its neighbours."""
    best: tuple[Tensor, ...] = (_error(grid, x, w, fit.d * fit.scale), fit.scale)
    for move in (-2, -1, 1, 2):
        a = (fit.scale + move).clamp(grid.low_scale, grid.high_scale)
        best = better(best, (_error(grid, x, w, fit.d * a), a))
    return _SuperFit(best[0].sum(1, keepdim=True), best[1], fit.d)


@kernel
def _refit_step(grid: Symmetric, x: Tensor, w: Tensor, fit: _SuperFit) -> _SuperFit:
    """`fit`, or the same with d solved for its codes where that is better."""
    c = _codes(grid, x, inverse(fit.d * fit.scale))
    wc = w * c
    uu = ((wc * c).sum(-2) * fit.scale * fit.scale).sum(1, keepdim=True)
    xu = ((wc * x).sum(-2) * fit.scale).sum(1, keepdim=True)
    d = signed_half(torch.where(uu > 0, xu / uu, fit.d))
    error = fit.error + (d * (d * uu - 2 * xu) - fit.d * (fit.d * uu - 2 * xu))
    return _SuperFit(*better(fit, (error, fit.scale, d)))


@kernel
def _final_codes(grid: Symmetric, x: Tensor, inverse_s: Tensor) -> Tensor:
    return _codes(grid, x, inverse_s).to(torch.int8)


@kernel
def _land(grid: Symmetric, x: Tensor, w: Tensor, landings: Tensor) -> tuple[Tensor, Tensor]:
    """d [n] and codes i8 [n, sub] of blocks as they lie."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    by = inverse(torch.where(high > -low, high, low))
    fit: tuple[Tensor, ...] = (torch.zeros_like(by), torch.zeros_like(by))
    for landing in landings.unbind():
        c = (x * (by * landing)).round()
        wc = w * c
        b, p = (wc * x).sum(-1, keepdim=True), (wc * c).sum(-1, keepdim=True)
        s = b * inverse(p)
        fit = better(fit, (-b * s, s))
    d = signed_half(fit[1])
    return d[:, 0], (x * inverse(d)).round().clamp(grid.low, grid.high).to(torch.int8)
