# mypy: ignore-errors
# (device code: Triton's types are not Python's)
"""Q8_0 in a kernel; the layout is drawn in `formats/legacy.py`."""

import triton
import triton.language as tl

from moequant.kernels.fields import half, lane, number

BLOCK, BYTES, WIDTH = 32, 34, 32


@triton.jit
def decode(block, scale, PART: tl.constexpr):
    """[U, 32] f32: the blocks at pointers [U, 1]."""
    code = tl.load(block + 2 + lane(32)) ^ 128  # two's complement as an offset of 128
    return half(block) * number(code, 128)
