# mypy: ignore-errors
# (device code: Triton's types are not Python's)
"""How a lane reads its piece of a row: in aligned 32-bit words, whatever byte the piece starts at.

`row` is a pointer to words, at or just before the row's first byte; offsets are in bytes from there.
"""

import triton
import triton.language as tl

NIBBLES = tl.constexpr(0x0F0F0F0F)


@triton.jit
def words(row, at, COUNT: tl.constexpr, ALIGNED: tl.constexpr, LAST: tl.constexpr = False):
    """COUNT words from byte `at`, as a tuple; ALIGNED: the bytes that `at` is known to be a multiple of.

    A multiple of 16 or 8 is read in loads of that size (COUNT must divide), of 4 word by word. Anything else
    is read as the aligned words that cover it, each once, and shifted. That may be one word more than there
    are: with LAST, where the row may end with these bytes, none lies beyond the last byte.
    """
    found = ()
    if ALIGNED >= 8:
        WIDE: tl.constexpr = ALIGNED // 4
        for i in tl.static_range(COUNT // WIDE):
            found += wide(row + (at // 4 + i * WIDE), WIDE)
    elif ALIGNED == 4:
        for i in tl.static_range(COUNT):
            found += (tl.load(row + (at // 4 + i)).to(tl.uint32, bitcast=True),)
    else:
        first = row + (at >> 2)
        shift = (at & 3) * 8
        this = tl.load(first).to(tl.uint32, bitcast=True)
        for i in tl.static_range(COUNT):
            if i + 1 < COUNT or not LAST:
                following = tl.load(first + (i + 1))
            else:
                following = tl.load(row + ((at + (4 * COUNT - 1)) >> 2))
            following = following.to(tl.uint32, bitcast=True)
            found += (funnel(this, following, shift),)
            this = following
    return found


@triton.jit
def wide(at, COUNT: tl.constexpr):
    """A tuple of COUNT (2 or 4) neighbouring words by one load; `at` [A, B, C] points to the first."""
    A: tl.constexpr = at.shape[0]
    B: tl.constexpr = at.shape[1]
    C: tl.constexpr = at.shape[2]
    word = tl.load(at[:, :, :, None] + tl.arange(0, COUNT)[None, None, None, :]).to(tl.uint32, bitcast=True)
    if COUNT == 2:
        first, second = tl.split(word)
        return (first, second)
    else:
        even, odd = tl.split(tl.reshape(word, [A, B, C, 2, 2]))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        return (first, second, third, fourth)


@triton.jit
def funnel(low, high, shift):
    """u32: the lower half of (high, low) >> shift, shift below 32."""
    return ((low.to(tl.uint64) | high.to(tl.uint64) << 32) >> shift.to(tl.uint64)).to(tl.uint32)


@triton.jit
def byte(row, at):
    """u32: the byte at `at`."""
    return tl.load(row.to(tl.pointer_type(tl.uint8), bitcast=True) + at).to(tl.uint32)


@triton.jit
def short(row, at):
    """u32: the two bytes at `at`, which must be even."""
    return tl.load(row.to(tl.pointer_type(tl.uint16), bitcast=True) + (at >> 1)).to(tl.uint32)


@triton.jit
def low_half(word):
    """f32: the f16 in the lower half of a word."""
    return word.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def high_half(word):
    """f32: the f16 in the upper half of a word."""
    return low_half(word >> 16)


@triton.jit
def number(word):
    """f32: a small unsigned integer."""
    return word.to(tl.int32).to(tl.float32)


@triton.jit
def nibbles(packed):
    """Tuple of the words of low nibbles of `packed`, then those of high nibbles."""
    low = ()
    high = ()
    for i in tl.static_range(len(packed)):
        low += (packed[i] & NIBBLES,)
        high += (packed[i] >> 4 & NIBBLES,)
    return low + high


@triton.jit
def right(packed, shift):
    """The words, each shifted right."""
    found = ()
    for i in tl.static_range(len(packed)):
        found += (packed[i] >> shift.to(tl.uint32),)
    return found


@triton.jit
def field(word, FROM: tl.constexpr, TO: tl.constexpr, MASK: tl.constexpr):
    """The bits of MASK in each byte (as they are after the move), moved from bit FROM to bit TO."""
    if TO >= FROM:
        return word << (TO - FROM) & MASK * 0x01010101
    else:
        return word >> (FROM - TO) & MASK * 0x01010101


@triton.jit
def spread(bits, TO: tl.constexpr):
    """Bit i of 0..15 to bit TO of byte i."""
    # The four products do not overlap; bit i of the factor 2^(7 i + TO) lands where it should.
    return bits * (0x00204081 << TO) & (0x01010101 << TO)
