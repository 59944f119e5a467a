# mypy: ignore-errors
# (device code: Triton's types are not Python's)
"""INT4 and INT8 groups of compressed-tensors' `pack-quantized` in a kernel.

A row is int32 words, codes lowest bits first, stored with half their range added. The scales lie apart.
"""

import triton
import triton.language as tl

from moequant.kernels.fields import nibbles, words

BLOCK, PIECE, GROUP = 32, 32, 32
BYTES4, BYTES8, ZERO4 = 16, 32, 8
ORDER4 = [8 * w + 2 * i + high for high in range(2) for w in range(4) for i in range(4)]


@triton.jit
def decode4(row, skew, piece, side, ISA: tl.constexpr):
    """(code words, scales, no offsets) of a piece, whose scale `side` points to; see `decoders.py`."""
    return nibbles(words(row, piece * 16, 4, 16)), (tl.load(side).to(tl.float32),), ()


@triton.jit
def decode8(row, skew, piece, side, ISA: tl.constexpr):
    """The same of INT8."""
    packed = words(row, piece * 32, 8, 16)
    code = ()
    for i in tl.static_range(8):
        code += (packed[i] ^ 0x80808080,)  # an offset of 128 as two's complement
    return code, (tl.load(side).to(tl.float32),), ()
