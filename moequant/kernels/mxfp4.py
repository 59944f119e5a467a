# mypy: ignore-errors
# (device code: Triton's types are not Python's)
"""MXFP4 in a kernel; the layout is drawn in `formats/fp4.py`."""

import triton
import triton.language as tl

from moequant.kernels.fields import lane

BLOCK, BYTES, WIDTH = 32, 17, 16


@triton.jit
def decode(block, scale, PART: tl.constexpr):
    """[U, 16] f32: half PART of the blocks at pointers [U, 1]."""
    code = (tl.load(block + 1 + lane(16)) >> (PART * 4) & 15).to(tl.int32)
    power = code >> 1 & 3
    # Twice the number that e2m1 means: exponent 0 is subnormal.
    size = tl.where(power == 0, code & 1, (2 | code & 1) << tl.maximum(power - 1, 0))
    value = tl.where(code < 8, size, -size).to(tl.float32)
    e = tl.load(block).to(tl.int32)
    # Half of 2^(e - 127); for the two smallest that is subnormal.
    bits = tl.where(e < 2, 1 << (21 + tl.minimum(e, 2)), (e - 1) << 23)
    return bits.to(tl.float32, bitcast=True) * value
