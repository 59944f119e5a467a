# mypy: ignore-errors
# (device code: Triton's types are not Python's)
"""What IQ3_*, IQ2_* and IQ1_* share: rows of a grid, loaded as words of signed bytes, and signs.

`side` points to the grid's rows: one word (four values) or two (eight) each.
"""

import triton
import triton.language as tl

from moequant.kernels.fields import spread, wide

BLOCK, PIECE = 256, 32


@triton.jit
def four(side, number):
    """The word of grid row `number`."""
    return tl.load(side + number.to(tl.int32)).to(tl.uint32, bitcast=True)


@triton.jit
def eight(side, number):
    """The two words of grid row `number`."""
    return wide(side + number.to(tl.int32) * 2, 2)


@triton.jit
def negate(word, signs):
    """Its bytes, none 0, negated where bits 0..3 of `signs` are set."""
    one = spread(signs & 15, 0)
    return (word ^ one * 255) + one


@triton.jit
def negate_all(values, signs):
    """Eight words, negated by the four bytes of `signs`."""
    code = ()
    for i in tl.static_range(8):
        code += (negate(values[i], signs >> (4 * i)),)
    return code


@triton.jit
def even_signs(field):
    """Four bytes of signs from 4 x 7 bits: the eighth makes their number even."""
    seven = field & 0x7F | field << 1 & 0x7F00 | field << 2 & 0x7F0000 | field << 3 & 0x7F000000
    return fill_parity(seven)


@triton.jit
def fill_parity(seven):
    """Bit 7 of each byte set where the number of its other bits is odd."""
    odd = seven ^ seven >> 4
    odd = odd ^ odd >> 2
    odd = odd ^ odd >> 1
    return seven | (odd & 0x01010101) << 7
