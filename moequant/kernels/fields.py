# mypy: ignore-errors
# (device code: Triton's types are not Python's)
"""Fields of a block that several formats share. Blocks start at any byte: wider reads must not be assumed."""

import triton
import triton.language as tl


@triton.jit
def half(at):
    """f32: the little-endian f16 at a pointer of any alignment."""
    low = tl.load(at).to(tl.uint16)
    high = tl.load(at + 1).to(tl.uint16)
    return (low | (high << 8)).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def lane(WIDTH: tl.constexpr):
    """[1, WIDTH]: the position of a weight in its part of the block."""
    return tl.arange(0, WIDTH)[None, :]


@triton.jit
def number(code, ZERO: tl.constexpr):
    """f32: code - ZERO, for 0 <= code < 2^23.

    By bits: code is the fraction of a float at 2^23, and one subtraction is exact. The unit
    that converts integers works at a fraction of the rate of this, and would be the bottleneck.
    """
    return (code.to(tl.uint32) | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + ZERO)
