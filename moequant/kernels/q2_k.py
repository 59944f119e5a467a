# mypy: ignore-errors
# (device code: Triton's types are not Python's)
"""Q2_K in a kernel; the layout is drawn in `formats/q2_k.py`."""

import triton
import triton.language as tl

from moequant.kernels.fields import half, lane, number

BLOCK, BYTES, WIDTH = 256, 84, 16


@triton.jit
def decode(block, scale, PART: tl.constexpr):
    """[U, 16] f32: weights 16 · PART … of the blocks at pointers [U, 1]."""
    both = tl.load(block + PART)
    code = tl.load(block + 16 + PART // 8 * 32 + PART % 2 * 16 + lane(16)) >> (PART % 8 // 2 * 2) & 3
    scale = half(block + 80) * (both & 15).to(tl.float32)
    return scale * number(code, 0) - half(block + 82) * (both >> 4).to(tl.float32)
