# mypy: ignore-errors
# (device code: Triton's types are not Python's)
"""TQ2_0 and TQ1_0 in a kernel; the layouts are told in `formats/ternary.py`.

A piece of TQ2_0 is one of `quarters.py`. One of TQ1_0 has 8, 4 and 1 bytes of the three runs of its block.
"""

import triton
import triton.language as tl

from moequant.kernels.fields import byte, low_half, short, words
from moequant.kernels.quarters import quarters

BYTES1, BYTES2, GROUP, ZERO = 54, 66, 64, 1
ORDER1 = [
    weight
    for p in range(4)
    for weight in (
        *(8 * p + 32 * k + 4 * w + i for w in range(2) for k in range(5) for i in range(4)),
        *(160 + 4 * p + 16 * k + i for k in range(5) for i in range(4)),
        *(240 + p + 4 * k for k in range(4)),
    )
]


@triton.jit
def decode2(row, skew, piece, side, ISA: tl.constexpr):
    """(code words, scales, no offsets) of a piece of TQ2_0; see `decoders.py`."""
    block = skew + (piece >> 2) * 66
    code = quarters(words(row, block + (piece & 3) * 16, 4, 2), 2, 0)
    return code, (low_half(short(row, block + 64)),), ()


@triton.jit
def _digits(word):
    """Five words: the digits in base 3 of each byte, highest first."""
    even = word & 0x00FF00FF
    odd = word >> 8 & 0x00FF00FF
    found = ()
    for _ in tl.static_range(5):
        even = even * 3
        odd = odd * 3
        found += (even >> 8 & 0x00FF00FF | odd & 0xFF00FF00,)
        even = even & 0x00FF00FF
        odd = odd & 0x00FF00FF
    return found


@triton.jit
def decode1(row, skew, piece, side, ISA: tl.constexpr):
    """The same of TQ1_0."""
    block = skew + (piece >> 2) * 54
    part = piece & 3
    first, second = words(row, block + part * 8, 2, 2)
    third = words(row, block + 32 + part * 4, 1, 2)[0]
    last = byte(row, block + 48 + part)
    even = (last * 0x00090001 & 0x00FF00FF) * 3
    odd = (last * 0x001B0003 & 0x00FF00FF) * 3
    code = _digits(first) + _digits(second) + _digits(third)
    code += (even >> 8 & 0x00FF00FF | odd & 0xFF00FF00,)
    return code, (low_half(short(row, block + 52)),), ()
