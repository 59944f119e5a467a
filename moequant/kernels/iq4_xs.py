# mypy: ignore-errors
# (device code: Triton's types are not Python's)
"""IQ4_XS in a kernel; the layout is drawn in `formats/iq4.py`."""

import triton
import triton.language as tl

from moequant.kernels.fields import half, lane, number

BLOCK, BYTES, WIDTH = 256, 136, 16

# The 16 values as bytes of two words, each shifted up by 128 so that they have no sign:
# -127 -104 -83 -65 -49 -35 -22 -10 and 1 13 25 38 53 69 89 113.
_NEGATIVE = tl.constexpr(0x766A5D4F3F2D1801)
_POSITIVE = tl.constexpr(0xF1D9C5B5A6998D81)


@triton.jit
def decode(block, scale, PART: tl.constexpr):
    """[U, 16] f32: half PART % 2 of sub-block PART // 2 of the blocks at pointers [U, 1]."""
    sub: tl.constexpr = PART // 2
    code = tl.load(block + 8 + sub * 16 + lane(16)) >> (PART % 2 * 4) & 15
    low = tl.load(block + 4 + sub // 2) >> (sub % 2 * 4) & 15
    high = tl.load(block + 2 + sub // 4) >> (sub % 4 * 2) & 3
    place = (code & 7).to(tl.uint64) * 8
    negative = tl.full([1, 1], _NEGATIVE, tl.uint64) >> place
    positive = tl.full([1, 1], _POSITIVE, tl.uint64) >> place
    value = number(tl.where(code < 8, negative, positive) & 255, 128)
    return half(block) * ((low | high << 4).to(tl.float32) - 32) * value
