# mypy: ignore-errors
# (device code: Triton's types are not Python's)
"""Blocks of 256 whose 2-bit fields lie in quarters: of each 128 weights, l + 32 q in bits 2 q of byte l.

Q2_K, Q3_K, Q6_K and TQ2_0 do so. A piece is 16 bytes of such fields: 64 weights, 16 of each quarter, which
are whole sub-blocks. Pieces 0 and 1 of a block are of its first half, 2 and 3 of its second.
"""

import triton
import triton.language as tl

from moequant.kernels.fields import field

BLOCK, PIECE = 256, 64
ORDER = [128 * (p // 2) + 16 * (p % 2) + 32 * q + i for p in range(4) for q in range(4) for i in range(16)]


@triton.jit
def quarters(packed, BITS: tl.constexpr, TO: tl.constexpr):
    """16 words from 4, quarter by quarter: q is BITS bits from bit q · BITS of each byte, moved to bit TO."""
    found = ()
    for i in tl.static_range(16):
        found += (field(packed[i % 4], i // 4 * BITS, TO, ((1 << BITS) - 1) << TO),)
    return found
