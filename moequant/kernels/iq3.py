# mypy: ignore-errors
# (device code: Triton's types are not Python's)
"""IQ3_S and IQ3_XXS in a kernel; the layouts are told in `formats/iq3.py`. A piece is a sub-block of 32."""

import triton
import triton.language as tl

from moequant.kernels.fields import byte, low_half, number, short, words
from moequant.kernels.grids import even_signs, four, negate_all

BYTES_S, BYTES_XXS, GROUP = 110, 98, 32


@triton.jit
def decode_s(row, skew, piece, side, ISA: tl.constexpr):
    """(code words, scales, no offsets) of a piece of IQ3_S; see `decoders.py`."""
    block = skew + (piece >> 3) * 110
    sub = piece & 7
    low = words(row, block + 2 + sub * 8, 2, 2)
    high = byte(row, block + 66 + sub)
    values = ()
    for i in tl.static_range(8):
        values += (four(side, low[i // 4] >> (i % 4 * 8) & 255 | (high >> i & 1) << 8),)
    signs = words(row, block + 74 + sub * 4, 1, 2)[0]
    level = byte(row, block + 106 + (sub >> 1)) >> ((sub & 1) * 4).to(tl.uint32) & 15
    scale = low_half(short(row, block)) * number(level * 2 + 1)
    return negate_all(values, signs), (scale,), ()


@triton.jit
def decode_xxs(row, skew, piece, side, ISA: tl.constexpr):
    """The same of IQ3_XXS."""
    block = skew + (piece >> 3) * 98
    sub = piece & 7
    low = words(row, block + 2 + sub * 8, 2, 2)
    values = ()
    for i in tl.static_range(8):
        values += (four(side, low[i // 4] >> (i % 4 * 8) & 255),)
    field = words(row, block + 66 + sub * 4, 1, 2, True)[0]
    scale = low_half(short(row, block)) * number((field >> 28) * 2 + 1) * 0.25
    return negate_all(values, even_signs(field)), (scale,), ()
