# mypy: ignore-errors
# (device code: Triton's types are not Python's)
"""Q3_K in a kernel; the layout is drawn in `formats/q3_k.py`, the pieces in `quarters.py`."""

import triton
import triton.language as tl

from moequant.kernels.fields import low_half, number, right, short, words
from moequant.kernels.quarters import quarters

BYTES, GROUP, ZERO = 110, 16, 4


@triton.jit
def decode(row, skew, piece, side, ISA: tl.constexpr):
    """(code words, scales, no offsets) of a piece; see `decoders.py`."""
    block = skew + (piece >> 2) * 110
    half = piece >> 1 & 1
    parity = piece & 1
    low = quarters(words(row, block + 32 + half * 32 + parity * 16, 4, 2), 2, 0)
    top = quarters(right(words(row, block + parity * 16, 4, 2), half * 4), 1, 2)
    code = ()
    for i in tl.static_range(16):
        code += (low[i] | top[i],)
    # The four sub-blocks' scales lie 2 bytes apart; the second half's are higher in the bytes.
    first, second, high = words(row, block + 96, 3, 2)
    shift = (parity * 8 + half * 4).to(tl.uint32)
    first = first >> shift & 0x000F000F | high >> shift << 4 & 0x00300030
    second = second >> shift & 0x000F000F | high >> shift << 2 & 0x00300030
    d = low_half(short(row, block + 108))
    scales = (
        d * (number(first & 63) - 32),
        d * (number(first >> 16) - 32),
        d * (number(second & 63) - 32),
        d * (number(second >> 16) - 32),
    )
    return code, scales, ()
