# mypy: ignore-errors
# (device code: Triton's types are not Python's)
"""Q4_K in a kernel; the layout is drawn in `formats/q4_k.py`."""

import triton
import triton.language as tl

from moequant.kernels.fields import half, lane, number

BLOCK, BYTES, WIDTH = 256, 144, 32


@triton.jit
def scale_and_minimum(block, PART: tl.constexpr):
    """Two f32 [U, 1]: what multiplies the codes of sub-block PART, and what is subtracted."""
    if PART < 4:
        scale = tl.load(block + 4 + PART) & 63
        minimum = tl.load(block + 8 + PART) & 63
    else:
        low = tl.load(block + 8 + PART)
        scale = low & 15 | tl.load(block + PART) >> 6 << 4
        minimum = low >> 4 | tl.load(block + 4 + PART) >> 6 << 4
    return half(block) * scale.to(tl.float32), half(block + 2) * minimum.to(tl.float32)


@triton.jit
def decode(block, scale, PART: tl.constexpr):
    """[U, 32] f32: sub-block PART of the blocks at pointers [U, 1]."""
    code = tl.load(block + 16 + PART // 2 * 32 + lane(32)) >> (PART % 2 * 4) & 15
    scale, minimum = scale_and_minimum(block, PART)
    return scale * number(code, 0) - minimum
