# mypy: ignore-errors
# (device code: Triton's types are not Python's)
"""Q5_K in a kernel; the layout is drawn in `formats/q4_k.py`."""

import triton
import triton.language as tl

from moequant.kernels.fields import lane, number
from moequant.kernels.q4_k import scale_and_minimum

BLOCK, BYTES, WIDTH = 256, 176, 32


@triton.jit
def decode(block, scale, PART: tl.constexpr):
    """[U, 32] f32: sub-block PART of the blocks at pointers [U, 1]."""
    low = tl.load(block + 48 + PART // 2 * 32 + lane(32)) >> (PART % 2 * 4) & 15
    high = tl.load(block + 16 + lane(32)) >> PART & 1
    scale, minimum = scale_and_minimum(block, PART)
    return scale * number(low | high << 4, 0) - minimum
