# mypy: ignore-errors
# (device code: Triton's types are not Python's)
"""INT4 and INT8 groups of compressed-tensors' `pack-quantized` in a kernel.

A row is int32 words, codes lowest bits first, stored with half their range added: read as bytes,
weight i is byte i (8 bits), or the low (even i) or high nibble of byte i // 2. A scale serves
`per_scale` neighbouring blocks of 32.
"""

import triton
import triton.language as tl

from moequant.kernels.fields import lane, number

BLOCK, WIDTH = 32, 32
BYTES4, BYTES8 = 16, 32


@triton.jit
def decode4(block, scale, PART: tl.constexpr):
    """[U, 32] f32: the blocks at pointers [U, 1]."""
    pair = tl.load(block + lane(16))
    code = tl.interleave(pair & 15, pair >> 4)
    return tl.load(scale).to(tl.float32) * number(code, 8)


@triton.jit
def decode8(block, scale, PART: tl.constexpr):
    """[U, 32] f32: the blocks at pointers [U, 1]."""
    code = tl.load(block + lane(32))
    return tl.load(scale).to(tl.float32) * number(code, 128)
