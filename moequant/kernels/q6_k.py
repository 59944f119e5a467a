# mypy: ignore-errors
# (device code: Triton's types are not Python's)
"""Q6_K in a kernel; the layout is drawn in `formats/q6_k.py`, the pieces in `quarters.py`."""

import triton
import triton.language as tl

from moequant.kernels.fields import low_half, nibbles, short, words
from moequant.kernels.quarters import quarters

BYTES, GROUP, ZERO = 210, 16, 32


@triton.jit
def decode(row, skew, piece, side, ISA: tl.constexpr):
    """(code words, scales, no offsets) of a piece; see `decoders.py`."""
    block = skew + (piece >> 2) * 210
    half = piece >> 1 & 1
    parity = piece & 1
    at = block + half * 64 + parity * 16
    # Quarters 0 and 1 lie in low nibbles, 2 and 3 in high ones.
    low = nibbles(words(row, at, 4, 2) + words(row, at + 32, 4, 2))
    high = quarters(words(row, block + 128 + half * 32 + parity * 16, 4, 2), 2, 4)
    code = ()
    for i in tl.static_range(16):
        code += (low[i] | high[i],)
    factors = words(row, block + 192 + half * 8, 2, 2)
    d = low_half(short(row, block + 208))
    scales = ()
    for q in tl.static_range(4):
        factor = (factors[q // 2] >> (parity * 8).to(tl.uint32) >> (q % 2 * 16)).to(tl.int8, bitcast=False)
        scales += (d * factor.to(tl.float32),)
    return code, scales, ()
