# mypy: ignore-errors
# (device code: Triton's types are not Python's)
"""4-bit codes that name one of 16 values: IQ4_NL, IQ4_XS, MXFP4 and NVFP4.

The layouts are told in `formats/iq4.py` and `formats/fp4.py`. Values are signed bytes, looked up four at a
time by byte permutation; a word then holds weights l, l + h, l + 1, l + h + 1 of a group of 2 h.
"""

import triton
import triton.language as tl

from moequant.formats import fp4, iq4
from moequant.kernels.fields import byte, low_half, number, short, words
from moequant.kernels.instructions import pick

BLOCK_NL, BYTES_NL, BLOCK_XS, BYTES_XS, GROUP_IQ = 32, 18, 256, 136, 32
BLOCK_MX, BYTES_MX, BLOCK_NV, BYTES_NV, GROUP_NV = 32, 17, 64, 36, 16
PIECE = 32


def _interleaved(group: int) -> list[int]:
    """The order of a group of weights whose halves share bytes."""
    return [i // 2 + group // 2 * (i % 2) for i in range(group)]


ORDER32 = _interleaved(32)
ORDER16 = _interleaved(16)


def _packed(values: list[float]) -> list[tl.constexpr]:
    """16 values as four little-endian words of signed bytes."""
    data = bytes(int(v) & 255 for v in values)
    return [tl.constexpr(int.from_bytes(data[i : i + 4], "little")) for i in range(0, 16, 4)]


_IQ0, _IQ1, _IQ2, _IQ3 = _packed(iq4.VALUES)
_FP0, _FP1, _FP2, _FP3 = _packed(fp4.VALUES)


@triton.jit
def _word(VALUE: tl.constexpr):
    return tl.full([1, 1, 1], VALUE, tl.uint32)


@triton.jit
def look_up(packed, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, D: tl.constexpr, ISA: tl.constexpr):
    """Two words of values for each word of eight codes; A to D hold the table."""
    found = ()
    for i in tl.static_range(len(packed)):
        low = packed[i] & 0x77777777
        # Byte k comes from the lower half of the table, or (bit 3 of its code) from the upper.
        half = packed[i] >> 1 & 0x44444444 | 0x32103210
        for _ in tl.static_range(2):
            lower = pick(_word(A), _word(B), low, ISA)
            upper = pick(_word(C), _word(D), low, ISA)
            found += (pick(lower, upper, half, ISA),)
            low = low >> 16
            half = half >> 16
    return found


@triton.jit
def decode_nl(row, skew, piece, side, ISA: tl.constexpr):
    """(code words, scales, no offsets) of a piece of IQ4_NL; see `decoders.py`."""
    block = skew + piece * 18
    code = look_up(words(row, block + 2, 4, 2, True), _IQ0, _IQ1, _IQ2, _IQ3, ISA)
    return code, (low_half(short(row, block)),), ()


@triton.jit
def decode_xs(row, skew, piece, side, ISA: tl.constexpr):
    """The same of IQ4_XS."""
    block = (piece >> 3) * 136
    sub = piece & 7
    code = look_up(words(row, block + 8 + sub * 16, 4, 8), _IQ0, _IQ1, _IQ2, _IQ3, ISA)
    first, second = words(row, block, 2, 8)
    low = second >> (sub * 4).to(tl.uint32) & 15
    high = first >> (16 + sub * 2).to(tl.uint32) & 3
    return code, (low_half(first) * (number(low | high << 4) - 32),), ()


@triton.jit
def decode_mx(row, skew, piece, side, ISA: tl.constexpr):
    """The same of MXFP4."""
    block = skew + piece * 17
    code = look_up(words(row, block + 1, 4, 1, True), _FP0, _FP1, _FP2, _FP3, ISA)
    e = byte(row, block)
    # 2^(e - 128): the codes are twice what e2m1 means. For e = 0 and 1 that is subnormal.
    bits = tl.where(e < 2, (1 << 21) << e, (e - 1) << 23)
    return code, (bits.to(tl.float32, bitcast=True),), ()


@triton.jit
def decode_nv(row, skew, piece, side, ISA: tl.constexpr):
    """The same of NVFP4."""
    block = (piece >> 1) * 36
    half = piece & 1
    code = look_up(words(row, block + 4 + half * 16, 4, 4), _FP0, _FP1, _FP2, _FP3, ISA)
    both = words(row, block, 1, 4)[0] >> (half * 16).to(tl.uint32)
    return code, (_e4m3(both & 255), _e4m3(both >> 8 & 255)), ()


@triton.jit
def _e4m3(code):
    """f32: half of the number that e4m3 means without its sign; 127, its NaN, is 0 as in ggml."""
    # Its fields as those of an f32: that is exact, subnormals too, and 2^120 too small.
    size = ((code & 127) << 20).to(tl.float32, bitcast=True) * 6.646139978924579e35
    return tl.where(code == 127, 0.0, size)
