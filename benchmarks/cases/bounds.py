"""The least error that any encoder can reach, against ggml's and ours.

Where weight = scale · level, the error of a sub-block is piecewise quadratic in 1 / scale: its codes change
where a weight crosses the middle between two levels and nowhere else, and with codes fixed the best scale
is a / b, a = sum(w·x·level), b = sum(w·level²). Between all crossings of both signs, every fit that nearest
codes allow is met, so the least error over real scales is exact (f64). No encoder can go below it: what a
format stores (an f16 step, an integer times a step) is a real scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.harness import Rows, case
from benchmarks.tensors import loss, twelve, weighted
from moequant import formats
from moequant.formats import Effort
from moequant.formats.codebook import midpoints
from moequant.formats.engine import even_out
from moequant.formats.parts import Scalar
from tests.formats import ggml

EFFORTS: tuple[Effort, ...] = ("fast", "default", "best")

VIEWS = {f.name: f.view for f in formats.FORMATS.values() if isinstance(f.view, Scalar) and not f.view.minima}
"""Types whose weights are scale · level: no minimum, no grid of rows."""


@dataclass(frozen=True)
class Bounds:
    """`rows` of each expert. `joint` adds the optimum over stored scales. `raised` takes importance as
    encoders take it, no less than 2 % of the median: as given, a tenth of the channels counts nothing in
    three of the tensors, and a bound may store anything there; an encoder may not."""

    types: tuple[str, ...] = tuple(VIEWS)
    rows: int = 8
    joint: bool = False
    raised: bool = False


@case("The least error that any encoder can reach", Bounds(("Q4_0",), rows=1), ("ggml",))
def bounds(o: Bounds) -> Rows:
    """Twelve tensors; geometric means of error over ggml's on the objective that the type minimises by
    default. `joint`, for super-blocks with integer scales: the least error over all f16 steps of both signs
    from 0.7 to 2 times the one with which the largest wanted scale just fits, every sub-block free to take
    any integer."""
    for name in o.types:
        ratios = [ratio(name, o, *case) for case in twelve(o.rows)]
        columns = zip(*(each.values() for each in ratios), strict=True)
        means = [measure.geometric_mean(column) for column in columns]
        yield {"type": name} | dict(zip(ratios[0], means, strict=True))


def ratio(name: str, o: Bounds, x: Tensor, given: Tensor) -> dict[str, float]:
    """Errors over ggml's of one tensor: bound, (joint optimum,) each effort."""
    fmt, view = formats.get(name), VIEWS[name]
    v = even_out(given.double()) if o.raised else given
    blocks, w = weighted(fmt, x, v)
    found = {"bound": lower_bound(blocks, w, view)}
    if o.joint:
        found["joint"] = joint(blocks, w, view)
    for effort in EFFORTS:
        ours = formats.dequantize(fmt, formats.quantize(fmt, x, given, effort))
        found[effort] = loss(fmt, x, v, ours)
    theirs = loss(fmt, x, v, ggml.dequantize(fmt, ggml.quantize(fmt, x, given)))
    return {name: error / theirs for name, error in found.items()}


class Pieces(NamedTuple):
    """Nearest codes of sub-blocks [k, m] as 1 / scale grows from 0, either sign: [2, k, events + 1] each.

    From `start` on (ascending, 0 first) a = sum(w·x·level) and b = sum(w·level²) hold.
    """

    start: Tensor
    a: Tensor
    b: Tensor


def pieces(x: Tensor, w: Tensor, levels: Tensor) -> Pieces:
    """x, w f64 [k, m], levels f64 ascending."""
    middle = torch.tensor(midpoints(levels.tolist()), dtype=x.dtype)
    first = torch.bucketize(torch.zeros((), dtype=x.dtype), middle)
    zero = levels[first]
    found = []
    for sign in (1, -1):
        t = sign * x
        crossing = (middle / t[..., None]).nan_to_num(torch.inf)  # a weight of 0 never crosses
        never = (crossing <= 0) | torch.isinf(crossing)
        # Weights above 0 climb the levels, weights below descend; either way from the level of 0.
        up = (t[..., None] > 0).to(x.dtype)
        low, high = levels[:-1], levels[1:]
        step = up * (high - low) + (1 - up) * (low - high)
        square = up * (high.square() - low.square()) + (1 - up) * (low.square() - high.square())
        when = crossing.masked_fill(never, torch.inf).flatten(1)
        order = when.argsort(1)
        a = (w[..., None] * t[..., None] * step).masked_fill(never, 0).flatten(1).gather(1, order).cumsum(1)
        b = (w[..., None] * square).masked_fill(never, 0).flatten(1).gather(1, order).cumsum(1)
        a0, b0 = (w * t).sum(1, keepdim=True) * zero, w.sum(1, keepdim=True) * zero.square()
        nought = torch.zeros_like(a0)
        found.append(
            Pieces(
                torch.cat([nought, when.gather(1, order)], 1),
                torch.cat([a0, a0 + a], 1),
                torch.cat([b0, b0 + b], 1),
            )
        )
    return Pieces(*(torch.stack(v) for v in zip(*found, strict=True)))


def free_scales(x: Tensor, w: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Of every sub-block [k, m] the least error over real scales, and the size of that scale, f64 [k]."""
    _, a, b = pieces(x, w, levels)
    gain = torch.where(b > 0, a.square() / b, 0.0)
    best, at = gain.transpose(0, 1).flatten(1).max(1)
    size = (a / b).nan_to_num(0.0).transpose(0, 1).flatten(1).gather(1, at[:, None])[:, 0].abs()
    return ((w * x.square()).sum(1) - best).clamp_min(0), size


def errors_at(p: Pieces, scale: Tensor) -> Tensor:
    """Error less sum(w·x²) of sub-blocks [k] at the scales f64 [k, c] > 0, of either sign: [2, k, c]."""
    inverse = (1 / scale).expand(2, *scale.shape).contiguous()
    at = (torch.searchsorted(p.start, inverse) - 1).clamp_min(0)
    return scale * (scale * p.b.gather(2, at) - 2 * p.a.gather(2, at))


def joint(x: Tensor, w: Tensor, view: Scalar) -> float:
    """The least error of blocks x, w f64 [n, block], summed, with f16 steps and the scales of the format."""
    levels, total = ascending(view), 0.0
    longest = int(max(abs(view.scales[0]), abs(view.scales[-1])))
    sizes = torch.arange(1, longest + 1, dtype=x.dtype)
    for xs, ws in zip(x.view(len(x), -1, view.sub), w.view(len(x), -1, view.sub), strict=True):
        p = pieces(xs, ws, levels)
        unit = float(free_scales(xs, ws, levels)[1].max()) / longest
        ends = torch.tensor([0.7 * unit, 2 * unit]).half().view(torch.int16).tolist()
        steps = torch.arange(ends[0], ends[1] + 1, dtype=torch.int16).view(torch.float16).to(x.dtype)
        saved = torch.inf
        for some in steps.split(64):
            error = errors_at(p, (some[:, None] * sizes).flatten().expand(len(xs), -1))
            error = error.view(2, len(xs), len(some), -1).clamp_max(0)  # a scale of 0 saves nothing
            # Integers reach from -longest to longest - 1: the sign of the step says which side is cut.
            whole, cut = error.amin(-1), error[..., : max(1, longest - 1)].amin(-1)
            for i in (0, 1):
                saved = min(saved, float(torch.minimum(whole[i], cut[1 - i]).sum(0).min()))
        total += float((ws * xs.square()).sum()) + saved
    return total


def ascending(view: Scalar) -> Tensor:
    """What an encoder may store, f64, each value once."""
    return torch.tensor(sorted({view.levels[c] for c in view.codes}), dtype=torch.float64)


def lower_bound(x: Tensor, w: Tensor, view: Scalar) -> float:
    """No encoder leaves less of x, w f64 [n, block], summed: any real scale; without d, any of the table."""
    scales = torch.tensor([view.scales[c] for c in view.scale_codes], dtype=x.dtype)
    total = 0.0
    for xs, ws in zip(x.view(-1, view.sub).split(2048), w.view(-1, view.sub).split(2048), strict=True):
        if view.stores_d:
            total += float(free_scales(xs, ws, ascending(view))[0].sum())
        else:
            found = errors_at(pieces(xs, ws, ascending(view)), scales[scales > 0].expand(len(xs), -1))
            total += float(((ws * xs.square()).sum(1) + found[0].amin(1).clamp_max(0)).sum())
    return total
