# mypy: ignore-errors
# (device code: Triton's types are not Python's)
"""Q4_K and Q5_K in a kernel; the layout is drawn in `formats/q4_k.py`.

A piece is 16 bytes of codes: 16 weights of one sub-block, and 16 of the next in the high nibbles.
"""

import triton
import triton.language as tl

from moequant.kernels.fields import field, high_half, low_half, nibbles, number, right, words

BLOCK, BYTES4, BYTES5, PIECE, GROUP = 256, 144, 176, 32, 16
ORDER = [64 * (j // 2) + 16 * (j % 2) + 32 * s + i for j in range(8) for s in range(2) for i in range(16)]


@triton.jit
def _header(row, block, j):
    """Two tuples of f32: what multiplies the codes of the two sub-blocks of chunk j, and what is added."""
    both, first, second, third = words(row, block, 4, 16)
    shift = ((j >> 1) & 1).to(tl.uint32) * 16
    first = first >> shift
    second = second >> shift
    third = third >> shift
    early = j < 4
    scale = tl.where(early, first & 0x3F3F, third & 0x0F0F | first >> 2 & 0x3030)
    least = tl.where(early, second & 0x3F3F, third >> 4 & 0x0F0F | second >> 2 & 0x3030)
    d = low_half(both)
    minus = -high_half(both)
    return (
        (d * number(scale & 255), d * number(scale >> 8)),
        (minus * number(least & 255), minus * number(least >> 8)),
    )


@triton.jit
def decode4(row, skew, piece, side, ISA: tl.constexpr):
    """(code words, scales, offsets) of a piece; see `decoders.py`."""
    block = (piece >> 3) * 144
    j = piece & 7
    scales, offsets = _header(row, block, j)
    return nibbles(words(row, block + 16 + j * 16, 4, 16)), scales, offsets


@triton.jit
def decode5(row, skew, piece, side, ISA: tl.constexpr):
    """The same of Q5_K."""
    block = (piece >> 3) * 176
    j = piece & 7
    scales, offsets = _header(row, block, j)
    low = nibbles(words(row, block + 48 + j * 16, 4, 16))
    top = right(words(row, block + 16 + (j & 1) * 16, 4, 16), j >> 1 << 1)
    code = ()
    for i in tl.static_range(8):
        code += (low[i] | field(top[i % 4], i // 4, 4, 16),)
    return code, scales, offsets
