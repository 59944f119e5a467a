# mypy: ignore-errors
# (device code: Triton's types are not Python's)
"""IQ2_S, IQ2_XS and IQ2_XXS in a kernel; the layouts are told in `formats/iq2.py`. A piece is 32 weights."""

import triton
import triton.language as tl

from moequant.kernels.fields import byte, low_half, number, short, words
from moequant.kernels.grids import eight, even_signs, fill_parity, negate_all

BYTES_S, BYTES_XS, BYTES_XXS, GROUP, GROUP_XXS = 82, 74, 66, 16, 32


@triton.jit
def _scales(d, both):
    """The scales of two groups of 16 whose levels share a byte."""
    return (d * number((both & 15) * 2 + 1) * 0.125, d * number((both >> 4) * 2 + 1) * 0.125)


@triton.jit
def decode_s(row, skew, piece, side, ISA: tl.constexpr):
    """(code words, scales, no offsets) of a piece of IQ2_S; see `decoders.py`."""
    block = skew + (piece >> 3) * 82
    sub = piece & 7
    low = words(row, block + 2 + sub * 4, 1, 2)[0]
    signs = words(row, block + 34 + sub * 4, 1, 2)[0]
    high = byte(row, block + 66 + sub)
    values = ()
    for i in tl.static_range(4):
        values += eight(side, low >> (8 * i) & 255 | (high >> (2 * i) & 3) << 8)
    scales = _scales(low_half(short(row, block)), byte(row, block + 74 + sub))
    return negate_all(values, signs), scales, ()


@triton.jit
def decode_xs(row, skew, piece, side, ISA: tl.constexpr):
    """The same of IQ2_XS."""
    block = skew + (piece >> 3) * 74
    sub = piece & 7
    first, second = words(row, block + 2 + sub * 8, 2, 2)
    values = ()
    for i in tl.static_range(4):
        field = first if i < 2 else second
        values += eight(side, field >> (i % 2 * 16) & 511)
    seven = first >> 9 & 0x7F | first >> 17 & 0x7F00 | (second >> 9 & 0x7F | second >> 17 & 0x7F00) << 16
    scales = _scales(low_half(short(row, block)), byte(row, block + 66 + sub))
    return negate_all(values, fill_parity(seven)), scales, ()


@triton.jit
def decode_xxs(row, skew, piece, side, ISA: tl.constexpr):
    """The same of IQ2_XXS, one group of 32."""
    block = skew + (piece >> 3) * 66
    low, field = words(row, block + 2 + (piece & 7) * 8, 2, 2, True)
    values = ()
    for i in tl.static_range(4):
        values += eight(side, low >> (8 * i) & 255)
    scale = low_half(short(row, block)) * number((field >> 28) * 2 + 1) * 0.125
    return negate_all(values, even_signs(field)), (scale,), ()
