# mypy: ignore-errors
# (device code: Triton's types are not Python's)
"""IQ1_S and IQ1_M in a kernel; the layouts are told in `formats/iq1.py`. A piece is 32 weights."""

import triton
import triton.language as tl

from moequant.kernels.fields import low_half, number, short, words
from moequant.kernels.grids import eight

BYTES_S, BYTES_M, GROUP_S, GROUP_M = 50, 56, 32, 8


@triton.jit
def _shift(scale, down):
    """±1/8 of the scale: minus where bit 0 of `down` is set."""
    return scale * (0.125 - 0.25 * number(down & 1))


@triton.jit
def decode_s(row, skew, piece, side, ISA: tl.constexpr):
    """(code words, scales, offsets) of a piece of IQ1_S; see `decoders.py`."""
    block = skew + (piece >> 3) * 50
    sub = piece & 7
    low = words(row, block + 2 + sub * 4, 1, 2)[0]
    field = short(row, block + 34 + sub * 2)
    values = ()
    for i in tl.static_range(4):
        values += eight(side, low >> (8 * i) & 255 | (field >> (3 * i) & 7) << 8)
    scale = low_half(short(row, block)) * number((field >> 12 & 7) * 2 + 1)
    return values, (scale,), (_shift(scale, field >> 15),)


@triton.jit
def decode_m(row, skew, piece, side, ISA: tl.constexpr):
    """The same of IQ1_M: each group of eight is shifted by itself."""
    block = (piece >> 3) * 56
    sub = piece & 7
    low = words(row, block + sub * 4, 1, 4)[0]
    nibble = short(row, block + 32 + sub * 2)
    first, second = words(row, block + 48, 2, 8)
    d = low_half(first >> 12 & 15 | first >> 28 << 4 | (second >> 12 & 15) << 8 | second >> 28 << 12)
    field = tl.where(sub < 4, first, second) >> ((sub >> 1 & 1) * 16 + (sub & 1) * 6).to(tl.uint32)
    values = ()
    scales = ()
    offsets = ()
    for i in tl.static_range(4):
        part = nibble >> (4 * i)
        values += eight(side, low >> (8 * i) & 255 | (part & 7) << 8)
        scale = d * number((field >> (i // 2 * 3) & 7) * 2 + 1)
        scales += (scale,)
        offsets += (_shift(scale, part >> 3),)
    return values, scales, offsets
