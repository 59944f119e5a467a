# mypy: ignore-errors
# (device code: Triton's types are not Python's)
"""Q6_K in a kernel; the layout is drawn in `formats/q6_k.py`."""

import triton
import triton.language as tl

from moequant.kernels.fields import half, lane, number

BLOCK, BYTES, WIDTH = 256, 210, 16


@triton.jit
def decode(block, scale, PART: tl.constexpr):
    """[U, 16] f32: weights 16 · PART … of the blocks at pointers [U, 1]."""
    upper: tl.constexpr = PART // 8
    quarter: tl.constexpr = PART % 8 // 2
    start: tl.constexpr = PART % 2 * 16
    low = tl.load(block + upper * 64 + quarter % 2 * 32 + start + lane(16)) >> (quarter // 2 * 4) & 15
    high = tl.load(block + 128 + upper * 32 + start + lane(16)) >> (quarter * 2) & 3
    factor = tl.load(block + 192 + PART).to(tl.int8, bitcast=True).to(tl.float32)
    return half(block + 208) * factor * number(low | high << 4, 32)
