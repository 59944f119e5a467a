"""FP8 (e4m3) as safetensors folders hold it: weight = code · scale, with a scale for a row or a square.

A block is part of a row: its scale in 16 bits, then a byte for each weight. In FP8_B128 blocks of 128
weights share their scale with those of 128 rows, which files hold once; here every block has a copy.

Codes have 4 significant bits whatever their size, so that a scale decides two things only: where in
their octave the weights fall, and whether the largest is cut off. It is chosen by measured error.
"""

from __future__ import annotations

import re
from functools import cache

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

_NAME = re.compile(r"FP8_(G[1-9]\d*|B128)_(" + "|".join(SCALES) + ")")

# The scale over the one that just reaches the largest weight: 1 first, then through the octave.
_TRIED: dict[Effort, tuple[float, ...]] = {
    "fast": (1.0,),
    "default": (1.0, 1.09, 1.19, 1.3, 1.41, 1.54, 1.68, 1.83, 0.94),
    "best": (1.0, *(2.0 ** (k / 24) for k in range(-6, 24) if k)),
}


def name_of(group: int, scale_dtypes: tuple[torch.dtype, ...]) -> str:
    """What `formats.get` calls rows of blocks of `group` with a scale each; 0 is squares of 128."""
    scales = next(name for name, dtypes in SCALES.items() if dtypes == scale_dtypes)
    return f"FP8_{f'G{group}' if group else 'B128'}_{scales}"


def named(name: str) -> Format | None:
    """The block format of that name, None when it is no name of one."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    shape, scales = found.groups()
    return _block_format(0 if shape == "B128" else int(shape[1:]), SCALES[scales])


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
def _block_format(group: int, dtypes: tuple[torch.dtype, ...]) -> Format:
    block, dtype = group or SIDE, dtypes[-1]

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
        return torch.stack([_squares(*each, effort, dtypes) for each in zip(x, w, strict=True)])

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
        name_of(group, dtypes), NO_GGML_TYPE, block, block + dtype.itemsize, encode, decode,
        limit=min(limit, 1e38), view=view, shared=None if group else Shared(find, encode_at),
    )  # fmt: skip


def _search(x: Tensor, w: Tensor, effort: Effort, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    """The best storable scale of each row: x, w [n, k] -> f32 [n]."""
    reach = x.abs().amax(-1) / TOP
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
    found = _search(squares, weights, effort, dtypes)
    return found.view(rows, across).repeat_interleave(SIDE, 0)[: len(x)]
