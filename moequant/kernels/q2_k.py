# mypy: ignore-errors
# (device code: Triton's types are not Python's)
"""Q2_K in a kernel; the layout is drawn in `formats/q2_k.py`, the pieces in `quarters.py`."""

import triton
import triton.language as tl

from moequant.kernels.fields import high_half, low_half, number, words
from moequant.kernels.quarters import quarters

BYTES, GROUP = 84, 16


@triton.jit
def decode(row, skew, piece, side, ISA: tl.constexpr):
    """(code words, scales, offsets) of a piece; see `decoders.py`."""
    block = (piece >> 2) * 84
    half = piece >> 1 & 1
    parity = piece & 1
    code = quarters(words(row, block + 16 + half * 32 + parity * 16, 4, 4), 2, 0)
    both = words(row, block + 80, 1, 4)[0]
    header = words(row, block + half * 8, 2, 4)
    d = low_half(both)
    minus = -high_half(both)
    scales = ()
    offsets = ()
    for q in tl.static_range(4):
        # Bytes 2 q + parity of the eight.
        field = header[q // 2] >> (parity * 8).to(tl.uint32) >> (q % 2 * 16)
        scales += (d * number(field & 15),)
        offsets += (minus * number(field >> 4 & 15),)
    return code, scales, offsets
