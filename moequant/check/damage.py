"""Which expert is not what it should be, judged from its values against the source's.

Rounding leaves marks that the rest of the tensor shares, damage does not. Five tests, each scaled
by the tensor itself, because rounding with error feedback errs several times as much as rounding
to nearest, and the formats differ by two orders of magnitude:

1. direction: an expert whose weights do not point where the source's do, or rather where another
   expert's do, holds something else; that other is named (a swapped pair names each other).
2. gain <w, q> / <w, w> of the expert: a scale that is off for all of it.
3. gain of every block: a damaged scale.
4. |w - q| in units of what the codes of its sub-block span: a damaged code.
5. ||w - q|| / ||w||: the expert as a whole.

Values cannot show a flip in the low bits of a code, which is as large as ordinary rounding, and
rounding with error feedback towards a corrected target leaves single errors that look like one and
moves weights on purpose, in attention's output by half their size. So where a recorded checksum
vouches for the bytes, only the first two tests are made; where there is none, or it does not agree,
the others say where.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from moequant import formats
from moequant.formats.parts import Scalar, Vector, look_up
from moequant.formats.rows import points

DIRECTION = 0.3
"""Least cosine of an expert with its source; the coarsest type (1.6 bits, with feedback) keeps 0.8, what
correction makes of an attention output of a random model 0.68. Other weights have about 0."""

NEARER = 0.01
"""By how much another source expert's cosine must exceed its own's to say that it is the other."""

GAIN = (0.55, 1.8)
"""Gains of a whole expert that rounding reaches: ternary codes with feedback shrink to 0.69."""

RELATIVE_GAIN = (0.6, 1.6)
"""Gains of an expert or a block over the tensor's median; clean blocks of 32 weights: 0.75 to 1.18."""

OUTLIER = 3.5
"""Largest |w - q| over its 99.99th percentile in the tensor; clean: 1 to 2.4 (with feedback up to 10)."""

ERROR = 4.0
"""Relative error of an expert over that of its format on normal weights; feedback reaches 2.5."""

_SAMPLE = 1 << 20


@dataclass(frozen=True, slots=True)
class Span:
    """What the codes of an expert reach: f32 [out, sub-blocks], the smallest and the largest weight of each
    sub-block. A scale of its own serves `block` weights of a row."""

    block: int
    low: Tensor
    high: Tensor


@dataclass(frozen=True, slots=True)
class Marks:
    """What one expert's rounding looks like.

    `error` ||w - q|| / ||w||; `norm` ||q||; `gain`, `cosine` of all its weights; `usual` the 99.99th
    percentile of |w - q| in ranges, `worst` the largest and where (row, column); block gains with their
    positions.
    """

    error: float
    norm: float
    gain: float
    cosine: float
    usual: float
    worst: float
    worst_at: tuple[int, int]
    block_gain: float
    low_gain: tuple[float, int, int]
    high_gain: tuple[float, int, int]


def marks(span: Span, source: Tensor, decoded: Tensor) -> Marks:
    """Compare one expert, source and decoded f32 [out, in]."""
    square, product = float(source.square().sum()), float((source * decoded).sum())
    norm = float(decoded.square().sum())
    off = (source - decoded).abs()
    ratio = _ratio(span, source, decoded)
    at = int(ratio.argmax())
    sample = ratio.flatten()[:: max(1, ratio.numel() // _SAMPLE)]
    block, gains = span.block, _block_gains(span.block, source, decoded)
    low, high = int(gains.argmin()), int(gains.argmax())

    def place(index: int) -> tuple[float, int, int]:
        row, number = divmod(index, gains.shape[1])
        return float(gains.flatten()[index]), row, number * block

    return Marks(
        error=float(off.square().sum() / max(square, 1e-30)) ** 0.5,
        norm=norm**0.5,
        gain=product / max(square, 1e-30),
        cosine=product / max((square * norm) ** 0.5, 1e-30),
        usual=float(sample.topk(1 + len(sample) // 10_000).values[-1]),
        worst=float(ratio.flatten()[at]),
        worst_at=divmod(at, source.shape[1]),
        block_gain=float(gains.median()),
        low_gain=place(low),
        high_gain=place(high),
    )


def _ratio(reach: Span, source: Tensor, decoded: Tensor) -> Tensor:
    """|w - q| in units of what the codes of the sub-block span, [out, in].

    A weight beyond what they reach counts from there: clipping outliers is part of rounding.
    """
    low, high = reach.low, reach.high
    w, q = (x.view(len(x), low.shape[1], -1) for x in (source, decoded))
    near = torch.minimum(torch.maximum(w, low[..., None]), high[..., None])
    span = high - low
    # Where a scale is next to nothing, a share of the row's largest stands in for it.
    span = torch.maximum(span, 0.05 * span.amax(1, keepdim=True)).clamp_min(1e-30)
    return ((near - q).abs() / span[..., None]).view_as(source)


def find(
    found: list[Marks], vouched: list[bool], expected: float, sources: Tensor, decoded: Tensor
) -> list[tuple[int, str]]:
    """(expert, what) of a tensor's damages, at most one an expert; `sources`, `decoded` f32 [E, out, in].

    `vouched` says whose bytes agree with a recorded checksum, `expected` is the format's usual error.
    """
    usual, gain, block = (
        float(torch.tensor([getattr(mark, name) for mark in found]).median())
        for name in ("usual", "gain", "block_gain")
    )
    damages, nearest = [], _nearest(sources, decoded)
    for expert, mark in enumerate(found):
        what = _direction(mark, expert, nearest[expert]) or _scale(mark, gain)
        if not what and not vouched[expert]:
            what = _block(mark, block) or _weight(mark, usual) or _whole(mark, expected)
        if what:
            damages.append((expert, what))
    return damages


def _direction(mark: Marks, expert: int, nearest: tuple[int, float]) -> str | None:
    """Whether an expert holds something else."""
    if not mark.norm < float("inf"):
        return "decodes to values that are not finite"
    other, cosine = nearest
    if other != expert and cosine > max(DIRECTION, mark.cosine + NEARER):
        return f"holds the weights of expert {other} of the baseline (cosine {cosine:.3f})"
    if mark.cosine < DIRECTION:
        return f"holds other weights than the baseline (cosine {mark.cosine:.3f})"
    return None


def _scale(mark: Marks, usual_gain: float) -> str | None:
    """Whether all of an expert is too large or too small."""
    relative = mark.gain / usual_gain if usual_gain else 0.0
    if not (GAIN[0] < mark.gain < GAIN[1] and RELATIVE_GAIN[0] < relative < RELATIVE_GAIN[1]):
        return f"weights are {mark.gain:.3g} times the baseline's; a scale is off"
    return None


def _block(mark: Marks, block_gain: float) -> str | None:
    """Whether a block of an expert is too large or too small."""
    for gain, row, column in (mark.high_gain, mark.low_gain):
        relative = gain / block_gain if block_gain else 0.0
        if not RELATIVE_GAIN[0] < relative < RELATIVE_GAIN[1]:
            return f"row {row}, block at column {column}: {relative:.3g} times the baseline's; a scale is off"
    return None


def _weight(mark: Marks, usual: float) -> str | None:
    """Whether a single weight of an expert is too far off."""
    if mark.worst <= OUTLIER * usual:
        return None
    row, column = mark.worst_at
    return (
        f"row {row}, column {column}: {mark.worst / usual:.1f} times the largest usual error; "
        "a bit of its code or scale is flipped"
    )


def _whole(mark: Marks, expected: float) -> str | None:
    """Whether an expert is too far off, wherever; the other tests say where."""
    if mark.error <= error_limit(expected):
        return None
    return f"relative error {mark.error:.3f}, {expected:.3f} is usual for the type"


def error_limit(expected: float) -> float:
    """The largest relative error that is taken for rounding."""
    return min(0.95, ERROR * expected)


def _nearest(sources: Tensor, decoded: Tensor) -> list[tuple[int, float]]:
    """Of each expert the source expert of the same direction, and the cosine."""
    norms = [x.flatten(1).norm(dim=1).clamp_min(1e-30) for x in (decoded, sources)]
    cosine = torch.nan_to_num(decoded.flatten(1) @ sources.flatten(1).T / norms[0][:, None] / norms[1])
    best = cosine.max(1)
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def _block_gains(block: int, source: Tensor, decoded: Tensor) -> Tensor:
    """Gains [rows, blocks]; blocks that are nearly empty count as the usual gain."""
    w, q = source.view(len(source), -1, block), decoded.view(len(decoded), -1, block)
    square = w.square().sum(-1)
    gains = (w * q).sum(-1) / square.clamp_min(1e-30)
    # A block far below its row's mean is rounded by what the rest of a super-block needs.
    enough = square > 0.05 * square.mean()
    usual = gains[enough].median() if bool(enough.any()) else gains.new_tensor(1.0)
    return torch.where(enough, gains, usual)


def of_codes(name: str, data: Tensor) -> Span:
    """What the codes of an expert can say: u8 [out, row_bytes] in a format of blocks."""
    fmt = formats.get(name)
    ends = _ends(fmt.view, data.reshape(-1, fmt.block_bytes))
    low, high = (torch.nan_to_num(end.reshape(len(data), -1)) for end in ends)
    return Span(fmt.block, torch.minimum(low, high), torch.maximum(low, high))


def of_values(decoded: Tensor, columns: int) -> Span:
    """What those of an expert do say, decoded f32 [out, in], where `columns` weights share a scale."""
    block = columns if decoded.shape[1] % columns == 0 else decoded.shape[1]
    low, high = torch.nan_to_num(decoded).view(len(decoded), -1, block).aminmax(dim=-1)
    return Span(block, low, high)


def _ends(view: Scalar | Vector | None, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The same for blocks u8 [n, block_bytes], in the order of the scale's sign."""
    if isinstance(view, Scalar):
        parts = view.unpack(blocks)
        step = parts.d.float() * look_up(view.scales, parts.scale)
        less = parts.dmin.float() * look_up(view.minima, parts.minimum) if view.minima else 0.0
        return step * min(view.levels) - less, step * max(view.levels) - less
    assert isinstance(view, Vector)
    fields, layout = view.unpack(blocks), view.layout
    step = fields.d.float() * layout.unit * (2 * fields.scale.float() + 1)
    end = step * (float(points(layout.grid.name).abs().max()) + abs(layout.grid.delta))
    return -end, end


@cache
def expected_error(name: str) -> float:
    """Relative error ||w - q|| / ||w|| of a format on normal weights, rounded without statistics."""
    fmt = formats.get(name)
    n_in = max(1, 1024 // fmt.block) * fmt.block
    weights = torch.randn(64, n_in, generator=torch.Generator().manual_seed(0)) * 0.02
    decoded = formats.dequantize(fmt, formats.quantize(fmt, weights, None, "fast", threads=1), threads=1)
    return float((weights - decoded).norm() / weights.norm())
