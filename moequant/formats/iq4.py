"""IQ4_NL and IQ4_XS: 4-bit codes into 16 unevenly spaced values.

IQ4_NL, 32 weights in 18 bytes: f16 d, then 16 bytes whose low nibbles are codes 0..15
and whose high nibbles are codes 16..31. A weight is d · VALUES[code].

IQ4_XS, 256 weights in 136 bytes: f16 d, u16 of eight 2-bit high parts, 4 bytes of eight
4-bit low parts of the sub-scales l (0..63), then 8 x 16 bytes of codes as above. A weight
is d · (l - 32) · VALUES[code].

Search: for fixed codes q the best scale is a/b with a = sum(w·x·q), b = sum(w·q²), and it
gains a²/b over storing zeros. A fan of scales of both signs (the values are not symmetric)
is tried, each refitted so. For IQ4_XS, d is fitted to those scales, and the levels around
them are compared by the error of the codes they give.
"""

from __future__ import annotations

from functools import cache

import torch
from gguf import quants
from torch import Tensor

from moequant.formats.base import Effort, Format
from moequant.formats.codebook import Ladder, inverse, midpoints, nearest, propose, ratio
from moequant.formats.kernel import kernel
from moequant.formats.layout import half, half_at, half_bytes, join_nibbles, split_nibbles
from moequant.formats.parts import Parts, Scalar, count_up
from moequant.native import Levels as Native
from moequant.native import loops

VALUES = [float(v) for v in quants.IQ4_NL.kvalues]
MIDS = midpoints(VALUES)
CODES = [float(i) for i in range(16)]
LADDER = Ladder(-32, 31, 1)

# Where the largest weight may land among the values (negative: with a negative scale), most useful first:
# chosen greedily for the least error over Gaussian and heavy tails, outlier columns, even and uneven
# importance. Sixteen come within 0.2 % of the optimum over every scale (benchmarks/cases/bounds.py).
LANDINGS = (-128, 114, -110, -140, -122, 128, -104, -132, 108, 90, 120, -154, -84, 146, -174, -136)
# (landings tried per block, refits of the best one)
BUDGET_NL = {"fast": (4, 1), "default": (16, 1), "best": (64, 2)}
# (the same two, super-block scales proposed, rounds over them)
BUDGET_XS = {"fast": (4, 1, 8, 1), "default": (12, 1, 16, 1), "best": (64, 2, 64, 3)}
GROUP = 4  # scales a kernel tries at once: its sums stay in registers


def fit(x: Tensor, w: Tensor, inverses: Tensor) -> list[tuple[Tensor, Tensor]]:
    """x, w [k, m], inverses [c, m] -> c times (a, b), [m]: sum(w·x·q), sum(w·q²) of the codes at each."""
    if not torch.compiler.is_compiling() and (native := loops(x.device)) is not None:
        return list(
            zip(*native.fit_levels(_native(tuple(VALUES))[0], x, w, inverses.contiguous()), strict=True)
        )
    fits = []
    for inv in inverses.unbind():
        q = nearest(x * inv, MIDS, VALUES)
        wq = w * q
        fits.append(((wq * x).sum(0), (wq * q).sum(0)))
    return fits


@cache
def _native(found: tuple[float, ...]) -> tuple[Native, Tensor]:
    """The levels as compiled loops take them, and the table of what is `found` nearest, by half steps."""
    steps = torch.arange(2 * int(VALUES[0]), 2 * int(VALUES[-1]) + 1, dtype=torch.float32, device="cpu")
    table = nearest(steps / 2 + 0.25, MIDS, found)
    return Native(VALUES[0], VALUES[-1], table.data_ptr()), table


@kernel
def try_scales(x: Tensor, w: Tensor, inverses: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The pair (a, b), [m], of the largest gain a²/b: the given one or that of a scale in inverses [c, m]."""
    gain = a * ratio(a, b)
    for new_a, new_b in fit(x, w, inverses):
        new_gain = new_a * ratio(new_a, new_b)
        better = new_gain > gain
        gain = torch.where(better, new_gain, gain)
        a, b = torch.where(better, new_a, a), torch.where(better, new_b, b)
    return a, b


@kernel
def try_levels(x: Tensor, w: Tensor, d: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """d [n], scale [8, n] -> the best levels near scale/d [8, n], their error [n] less that of storing
    zeros, and the best d [n] for the codes they give."""
    middle = (scale * inverse(d)).round()
    options = [(middle + step).clamp(LADDER.lowest, LADDER.highest) for step in (0, -1, 1)]
    fits = fit(x, w, torch.stack([inverse(d * level).view(-1) for level in options]))
    level, best = options[0], torch.full_like(scale, torch.inf)
    best_a, best_b = torch.zeros_like(scale), torch.zeros_like(scale)
    for option, (a, b) in zip(options, fits, strict=True):
        a, b, step = a.view_as(scale), b.view_as(scale), d * option
        error = step * (step * b - 2 * a)  # sum(w (x - step q)²) - sum(w x²)
        better = error < best
        best = torch.where(better, error, best)
        level = torch.where(better, option, level)
        best_a, best_b = torch.where(better, a, best_a), torch.where(better, b, best_b)
    return level, best.sum(0), ratio((level * best_a).sum(0), (level * level * best_b).sum(0))


def codes(x: Tensor, inv: Tensor) -> Tensor:
    """x [32, m], inv [m] -> uint8 [32, m]."""
    if (native := loops(x.device)) is not None:
        return native.code_levels(_native(tuple(CODES))[0], x, inv.contiguous())
    return _codes_by_torch(x, inv)


@kernel
def _codes_by_torch(x: Tensor, inv: Tensor) -> Tensor:
    return nearest(x * inv, MIDS, CODES).to(torch.uint8)


def search_scale(x: Tensor, w: Tensor, count: int, refits: int) -> tuple[Tensor, Tensor]:
    """x, w [32, m] -> the a and b (see `fit`), [m], of each column's best scale among `count` landings."""
    lowest, highest = x.amin(0), x.amax(0)
    peak = inverse(torch.where(highest > -lowest, highest, lowest))
    landings = torch.tensor(LANDINGS, dtype=torch.float32, device=x.device)[:count]
    if count > len(LANDINGS):
        spread = torch.linspace(60, 160, count // 2, dtype=torch.float32, device=x.device)
        landings = torch.cat([spread, -spread])
    a = b = torch.zeros_like(peak)
    for i in range(0, len(landings), GROUP):
        a, b = try_scales(x, w, landings[i : i + GROUP, None] * peak, a, b)
    for _ in range(refits):
        a, b = try_scales(x, w, inverse(ratio(a, b))[None], a, b)
    return a, b


def encode_nl(x: Tensor, w: Tensor, effort: Effort) -> Tensor:
    """IQ4_NL: x, w [n, 32] -> uint8 [n, 18]."""
    columns = x.t().contiguous()
    scale = half(ratio(*search_scale(columns, w.t().contiguous(), *BUDGET_NL[effort])))
    found = codes(columns, inverse(scale)).t().contiguous()
    return pack_nl(_parts(found, found[:, :0], scale[:, None].to(torch.float16)))


def encode_xs(x: Tensor, w: Tensor, effort: Effort) -> Tensor:
    """IQ4_XS: x, w [n, 256] -> uint8 [n, 136]."""
    n = len(x)
    columns = x.view(n, 8, 32).permute(2, 1, 0).reshape(32, 8 * n)
    weight = w.view(n, 8, 32).permute(2, 1, 0).reshape(32, 8 * n)
    count, refits, tries, rounds = BUDGET_XS[effort]
    a, b = search_scale(columns, weight, count, refits)
    reach = torch.linspace(24, 32, tries // 2, dtype=torch.float32, device=x.device)
    scale = ratio(a, b).view(8, n)
    d = propose(columns, scale, b.view(8, n), torch.cat([-reach, reach - 1]), LADDER)
    best = torch.full_like(d, torch.inf)
    best_d, best_level = d, torch.zeros_like(scale)
    for _ in range(rounds):
        d = half(d)
        level, error, better_d = try_levels(columns, weight, d, scale)
        won = error < best
        best = torch.where(won, error, best)
        best_d, best_level = torch.where(won, d, best_d), torch.where(won, level, best_level)
        d = better_d
    found = codes(columns, inverse(best_d * best_level).view(-1)).view(32, 8, n)
    stored = (best_level - LADDER.lowest).to(torch.uint8).t()
    return pack_xs(_parts(found.permute(2, 1, 0).reshape(n, 256), stored, best_d[:, None].to(torch.float16)))


def pack_nl(parts: Parts) -> Tensor:
    """IQ4_NL: -> uint8 [n, 18]."""
    return torch.cat([half_bytes(parts.d), join_nibbles(parts.codes, 16)], 1)


def unpack_nl(packed: Tensor) -> Parts:
    """IQ4_NL: uint8 [n, 18] -> its fields."""
    codes = split_nibbles(packed[:, 2:], 16)
    return _parts(codes, torch.zeros_like(codes[:, :1]), half_at(packed, 0))


def pack_xs(parts: Parts) -> Tensor:
    """IQ4_XS: -> uint8 [n, 136]."""
    low, high = parts.scale & 15, parts.scale >> 4
    return torch.cat(
        [
            half_bytes(parts.d),
            high[:, ::4] | high[:, 1::4] << 2 | high[:, 2::4] << 4 | high[:, 3::4] << 6,
            low[:, ::2] | low[:, 1::2] << 4,
            join_nibbles(parts.codes, 16),
        ],
        1,
    )


def unpack_xs(packed: Tensor) -> Parts:
    """IQ4_XS: uint8 [n, 136] -> its fields."""
    at = torch.arange(8, device=packed.device)
    high = packed[:, 2 + at // 4] >> (at % 4 * 2).to(torch.uint8) & 3
    low = packed[:, 4 + at // 2] >> (at % 2 * 4).to(torch.uint8) & 15
    return _parts(split_nibbles(packed[:, 8:], 16), low | high << 4, half_at(packed, 0))


def _parts(codes: Tensor, scale: Tensor, d: Tensor) -> Parts:
    return Parts(codes, scale, codes[:, :0], d, d[:, :0])


VIEW_NL = Scalar(32, tuple(VALUES), unpack_nl, pack_nl, range(16))
VIEW_XS = Scalar(
    32, tuple(VALUES), unpack_xs, pack_xs, range(16), count_up(LADDER.lowest, LADDER.highest), range(64)
)
IQ4_NL = Format("IQ4_NL", 20, 32, 18, encode_nl, VIEW_NL.decode, magnitude=1.0, view=VIEW_NL, loops=True)
IQ4_XS = Format("IQ4_XS", 23, 256, 136, encode_xs, VIEW_XS.decode, magnitude=1.0, view=VIEW_XS, loops=True)
