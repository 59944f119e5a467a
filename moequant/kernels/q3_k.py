# mypy: ignore-errors
# (device code: Triton's types are not Python's)
"""Q3_K in a kernel; the layout is drawn in `formats/q3_k.py`."""

import triton
import triton.language as tl

from moequant.kernels.fields import half, lane, number

BLOCK, BYTES, WIDTH = 256, 110, 16


@triton.jit
def decode(block, scale, PART: tl.constexpr):
    """[U, 16] f32: weights 16 · PART … of the blocks at pointers [U, 1]."""
    start: tl.constexpr = PART % 2 * 16
    top = tl.load(block + start + lane(16)) >> (PART // 2) & 1
    low = tl.load(block + 32 + PART // 8 * 32 + start + lane(16)) >> (PART % 8 // 2 * 2) & 3
    nibble = tl.load(block + 96 + PART % 8) >> (PART // 8 * 4) & 15
    high = tl.load(block + 104 + PART % 4) >> (PART // 4 * 2) & 3
    scale = (nibble | high << 4).to(tl.float32) - 32
    return half(block + 108) * scale * number(low | top << 2, 4)
