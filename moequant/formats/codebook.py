"""What the formats with a table of values share: nearest values, ladders of scales, safe divisions.

The tables themselves are read from the installed `gguf` package.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from moequant.formats.kernel import kernel
from moequant.native import Rungs, loops

TINY = 1e-30  # stands for 0 where something divides by it


def midpoints(levels: Sequence[float]) -> list[float]:
    """Halfway points of ascending levels: x belongs to level i when mid[i-1] < x <= mid[i]."""
    return [(a + b) / 2 for a, b in itertools.pairwise(levels)]


@cache
def _by_steps(
    mids: tuple[float, ...], values: tuple[float, ...], device: torch.device
) -> tuple[int, int, Tensor]:
    """How many steps 1 has, of which every border is a multiple; the first border in steps; and the value of
    every step from there to behind the last. A search among borders takes ten times as long."""
    fine = next(fine for fine in (1, 2, 4, 8, 16) if all((fine * mid).is_integer() for mid in mids))
    first, last = round(fine * mids[0]), round(fine * mids[-1])
    found = [values[bisect_left(mids, step / fine)] for step in range(first, last + 2)]
    return fine, first, torch.tensor(found, dtype=torch.float32, device=device)


def nearest(t: Tensor, mids: Sequence[float], values: Sequence[float]) -> Tensor:
    """The value whose interval holds t; values has one more entry than mids, which are multiples of 1/16
    or more. Shape of t, f32."""
    if not torch.compiler.is_compiling():
        fine, first, table = _by_steps(tuple(mids), tuple(values), t.device)
        # A number is at most a border if, and only if, it is so rounded up to a step.
        at = (fine * t).ceil_().sub_(first).clamp_(0, len(table) - 1).to(torch.int32)
        at.clamp_(0)  # what is no number
        return table.index_select(0, at.flatten()).view(t.shape)
    # A chain of compares stays in vector registers, where a table look-up would not.
    found = torch.full_like(t, values[0])
    for mid, value in zip(mids, values[1:], strict=True):
        found = torch.where(t > mid, value, found)
    return found


def u16_bytes(value: Tensor) -> Tensor:
    """int [n, k] in 0..65535 -> uint8 [n, 2 k], little-endian."""
    return torch.stack([value & 255, value >> 8], -1).to(torch.uint8).flatten(1)


def u16_from(packed: Tensor) -> Tensor:
    """uint8 [n, 2 k], little-endian -> int32 [n, k]."""
    pair = packed.to(torch.int32).view(len(packed), -1, 2)
    return pair[..., 0] | pair[..., 1] << 8


def inverse(scale: Tensor) -> Tensor:
    """1/scale, and 0 where the scale is 0 or so small that 1/scale is not a number one can use."""
    return torch.where(scale.abs() > TINY, 1 / scale, torch.zeros_like(scale))


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator for denominator >= 0, and 0 where it is 0."""
    return torch.where(denominator > TINY, numerator / denominator, torch.zeros_like(numerator))


class Ladder(NamedTuple):
    """The sub-scales a super-block can store: lowest, lowest + step, … highest times its d."""

    lowest: int
    highest: int
    step: int

    def snap(self, level: Tensor) -> Tensor:
        """The nearest rung."""
        rung = ((level - self.lowest) / self.step).round() * self.step + self.lowest
        return rung.clamp(self.lowest, self.highest)


def propose(x: Tensor, scale: Tensor, curvature: Tensor, reach: Tensor, ladder: Ladder) -> Tensor:
    """d [n] whose multiples on the ladder come closest to the scales [s, n], weighted by their curvature.

    reach [t]: the multiples tried for the scale that is largest in size. x, the weights, only tells
    `kernel` how many there are.
    """
    if (native := loops(x.device)) is None:
        return propose_by_torch(x, scale, curvature, reach, ladder)
    rungs = Rungs(ladder.lowest, ladder.highest, ladder.step)
    return native.propose(rungs, *(each.contiguous() for each in (scale, curvature, reach)))


@kernel
def propose_by_torch(x: Tensor, scale: Tensor, curvature: Tensor, reach: Tensor, ladder: Ladder) -> Tensor:
    """The same, computed by torch."""
    lowest, highest = scale.amin(0), scale.amax(0)
    d = torch.where(highest >= -lowest, highest, lowest) / reach[:, None]
    for _ in range(2):
        level = ladder.snap(scale[:, None] * inverse(d))  # [s, t, n]
        weighted = curvature[:, None] * level
        d = ratio((weighted * scale[:, None]).sum(0), (weighted * level).sum(0))
    error = (curvature[:, None] * (scale[:, None] - d * level).square()).sum(0)
    return d.gather(0, error.argmin(0, keepdim=True))[0]
