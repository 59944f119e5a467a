# mypy: ignore-errors
# (device code: Triton's types are not Python's)
"""Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 in a kernel; the layouts are drawn in `formats/legacy.py`.

A piece is a block, of Q8_0 half a block.
"""

import triton
import triton.language as tl

from moequant.kernels.fields import high_half, low_half, nibbles, short, spread, words

BLOCK, PIECE = 32, 32
BYTES40, BYTES41, BYTES50, BYTES51, BYTES80, PIECE80 = 18, 20, 22, 24, 34, 16
ZERO4, ZERO5 = 8, 16


@triton.jit
def decode40(row, skew, piece, side, ISA: tl.constexpr):
    """(code words, scales, no offsets) of a piece of Q4_0; see `decoders.py`."""
    block = skew + piece * 18
    return nibbles(words(row, block + 2, 4, 2, True)), (low_half(short(row, block)),), ()


@triton.jit
def decode41(row, skew, piece, side, ISA: tl.constexpr):
    """(code words, scales, offsets) of a piece of Q4_1."""
    both, a, b, c, d = words(row, piece * 20, 5, 4)
    return nibbles((a, b, c, d)), (low_half(both),), (high_half(both),)


@triton.jit
def _five(low, top):
    """Words of 5-bit codes from those of their low nibbles, and a word of their highest bits."""
    code = ()
    for i in tl.static_range(8):
        code += (low[i] | spread(top >> (4 * i) & 15, 4),)
    return code


@triton.jit
def decode50(row, skew, piece, side, ISA: tl.constexpr):
    """The same of Q5_0, without offsets."""
    block = skew + piece * 22
    top, a, b, c, d = words(row, block + 2, 5, 2, True)
    return _five(nibbles((a, b, c, d)), top), (low_half(short(row, block)),), ()


@triton.jit
def decode51(row, skew, piece, side, ISA: tl.constexpr):
    """The same of Q5_1."""
    both, top, a, b, c, d = words(row, piece * 24, 6, 8)
    return _five(nibbles((a, b, c, d)), top), (low_half(both),), (high_half(both),)


@triton.jit
def decode80(row, skew, piece, side, ISA: tl.constexpr):
    """The same of Q8_0, without offsets."""
    block = skew + (piece >> 1) * 34
    return words(row, block + 2 + (piece & 1) * 16, 4, 2, True), (low_half(short(row, block)),), ()
