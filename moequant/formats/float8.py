"""FP8 (e4m3) as safetensors folders hold it: weight = code · scale, for a row, a square or a matrix.

A block is part of a row: its scale in 16 bits, then a byte for each weight. In FP8_B128 blocks of 128
weights share their scale with those of 128 rows, and in FP8_W… rows share it with all of the matrix and of
weights that multiply the same inputs: vLLM fuses those, and would round them again to the largest scale.
Files hold such a scale once; here every block has a copy.

Codes have 4 significant bits whatever their size, so that a scale decides two things only: where in
their octave the weights fall, and whether the largest is cut off. It is chosen by measured error.

Scales of squares are powers of two. On GPUs with DeepGEMM (compute capability 9.0, 10.x and 12.x) vLLM 0.32
rounds such weights a second time, to scales that are (`requant_weight_ue8m0_inplace`, read): then it finds
nothing to round.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from moequant.formats.base import NO_GGML_TYPE, Effort, Format, Shared
from moequant.formats.groups import SCALES, storable
from moequant.formats.layout import better, inverse
from moequant.formats.parts import Parts, Scalar

TOP = 448.0
"""The largest number of e4m3."""

SIDE = 128
"""Rows and columns that share a scale in FP8_B128."""

ROWS = 256
"""Rows of a matrix on which the scale of all of it is tried."""

_NAME = re.compile(r"FP8_([GW])([1-9]\d*)_(" + "|".join(SCALES) + ")|FP8_(B)(128)_(" + "|".join(SCALES) + ")")

Span = Literal["row", "square", "matrix"]
"""What a scale serves."""

_LETTERS: dict[Span, str] = {"row": "G", "square": "B", "matrix": "W"}

# The scale over the one that just reaches the largest weight: 1 first, then through the octave.
_TRIED: dict[Effort, tuple[float, ...]] = {
    "fast": (1.0,),
    "default": (1.0, 1.09, 1.19, 1.3, 1.41, 1.54, 1.68, 1.83, 0.94),
    "best": (1.0, *(2.0 ** (k / 24) for k in range(-6, 24) if k)),
}


def name_of(span: Span, n_in: int, scale_dtypes: tuple[torch.dtype, ...]) -> str:
    """What `formats.get` calls rows of `n_in` whose scales serve that much of a matrix."""
    scales = next(name for name, dtypes in SCALES.items() if dtypes == scale_dtypes)
    return f"FP8_{_LETTERS[span]}{SIDE if span == 'square' else n_in}_{scales}"


def named(name: str) -> Format | None:
    """The block format of that name, None when it is no name of one."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    letter, block, scales = (group for group in found.groups() if group is not None)
    span = next(span for span, known in _LETTERS.items() if known == letter)
    return _block_format(span, int(block), SCALES[scales])


def snap(t: Tensor) -> Tensor:
    """f32: the nearest number of e4m3; what is beyond the largest becomes it."""
    return t.clamp_(-TOP, TOP).to(torch.float8_e4m3fn).to(torch.float32)


def code_of(level: Tensor) -> Tensor:
    """u8: the bytes of numbers that e4m3 has."""
    return level.to(torch.float8_e4m3fn).view(torch.uint8)


def _levels() -> tuple[float, ...]:
    """The number of every byte; the two that stand for NaN are never written, and 0 here."""
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32)
    return tuple(numbers.nan_to_num(0.0).tolist())


@cache
def _block_format(span: Span, block: int, dtypes: tuple[torch.dtype, ...]) -> Format:
    dtype, common = dtypes[-1], {"square": _squares, "matrix": _whole}.get(span)

    def pack(parts: Parts) -> Tensor:
        scale = parts.d.to(dtype).flatten().contiguous().view(-1, 1).view(torch.uint8)
        return torch.cat([scale, parts.codes], 1)

    def unpack(blocks: Tensor) -> Parts:
        codes, scale = blocks[:, 2:], blocks[:, :2].clone().view(dtype)
        return Parts(codes, torch.zeros_like(codes[:, :1]), codes[:, :0], scale, scale[:, :0])

    def encode_at(x: Tensor, w: Tensor, d: Tensor, effort: Effort) -> Tensor:
        codes, none = code_of(snap(x * inverse(d))), d[:, :0]
        return pack(Parts(codes, codes[:, :1], codes[:, :0], d, none))

    def encode(x: Tensor, w: Tensor, effort: Effort) -> Tensor:
        return encode_at(x, w, _search(x, w, effort, dtypes)[:, None], effort)

    def find(x: Tensor, w: Tensor, effort: Effort) -> Tensor:
        assert common is not None
        return torch.stack([common(*each, effort, dtypes) for each in zip(x, w, strict=True)])

    def decode(blocks: Tensor) -> Tensor:
        parts = unpack(blocks)  # in the scale's own precision, as a model computes it
        codes = parts.codes.contiguous().view(torch.float8_e4m3fn)
        return (codes.to(dtypes[0]) * parts.d.to(dtypes[0])).to(torch.float32)

    view = Scalar(
        sub=block,
        levels=_levels(),
        unpack=unpack,
        pack=pack,
        codes=range(256),
        storable=lambda scale: storable(scale, dtypes),
        snap=snap,
        code_of=code_of,
    )
    limit = min(torch.finfo(each).max for each in dtypes)
    return Format(
        name_of(span, block, dtypes), NO_GGML_TYPE, block, block + dtype.itemsize, encode, decode,
        limit=min(limit, 1e38), view=view,
        shared=None if common is None else Shared(find, encode_at, across=span == "matrix"),
    )  # fmt: skip


def _search(
    x: Tensor, w: Tensor, effort: Effort, dtypes: tuple[torch.dtype, ...], most: Tensor | None = None
) -> Tensor:
    """The best storable scale of each row: x, w [n, k] -> f32 [n]. `most` f32 [n] is the largest weight that
    it is for, where x is not all of them."""
    reach = (x.abs().amax(-1) if most is None else most) / TOP
    best: tuple[Tensor, ...] = (torch.full_like(reach, torch.inf), torch.zeros_like(reach))
    for factor in _TRIED[effort]:
        scale = storable(reach * factor, dtypes)
        best = better(best, (_error(x, w, scale), scale))
        if effort != "fast":  # the scale that suits those codes best
            codes = snap(x * inverse(scale)[:, None])
            fit = (w * codes * x).sum(-1) * inverse((w * codes * codes).sum(-1))
            scale = storable(fit, dtypes)
            best = better(best, (_error(x, w, scale), scale))
    return best[1]


def _power(x: Tensor, w: Tensor, effort: Effort, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    """The better of two powers of two for each row x, w [n, k] -> f32 [n]: the one that reaches the largest
    weight, or half of it, which cuts off."""
    reach = (x.abs().amax(-1) / TOP).frexp()
    # A power of two is its own: its mantissa is 0.5.
    exponent = reach.exponent - (reach.mantissa == 0.5).int()
    whole = storable(torch.ldexp((reach.mantissa > 0).float(), exponent), dtypes)
    if effort == "fast":
        return whole
    half = storable(whole / 2, dtypes)
    return better((_error(x, w, whole), whole), (_error(x, w, half), half))[1]


def _error(x: Tensor, w: Tensor, scale: Tensor) -> Tensor:
    """Weighted squared error of each row [n, k] under its scale [n]."""
    off = x - scale[:, None] * snap(x * inverse(scale)[:, None])
    return (w * off.square_()).sum(-1)


def _squares(x: Tensor, w: Tensor, effort: Effort, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    """The scales of one matrix x [out, in] in squares, w [in] -> f32 [out, in / 128]."""
    rows, across = -(-len(x) // SIDE), x.shape[1] // SIDE
    padded = torch.nn.functional.pad(x, (0, 0, 0, rows * SIDE - len(x)))
    squares = padded.view(rows, SIDE, across, SIDE).transpose(1, 2).reshape(rows * across, -1)
    weights = w.view(1, across, 1, SIDE).expand(rows, across, SIDE, SIDE).reshape(rows * across, -1)
    found = _power(squares, weights, effort, dtypes)
    return found.view(rows, across).repeat_interleave(SIDE, 0)[: len(x)]


def _whole(x: Tensor, w: Tensor, effort: Effort, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    """The scale of one matrix x [out, in], w [in], found on some of its rows -> f32 [out, 1]."""
    rows = x[torch.linspace(0, len(x) - 1, min(ROWS, len(x))).round().long()]
    weights = w.expand_as(rows).reshape(1, -1)
    found = _search(rows.reshape(1, -1), weights, effort, dtypes, x.abs().amax().view(1))
    return found.expand(len(x), 1)
