# mypy: ignore-errors
# (device code: Triton's types are not Python's)
"""The product for many tokens, for any format: by tensor cores, f16 operands and f32 sums.

The same decoders as for few tokens; a lane turns its piece into f16 two weights an instruction. bf16 operands
would round weights by up to 2^-9 and miss 1e-3. Powers of two, `x_scale` [tokens] and `WEIGHT_SCALE`, bring
both operands to where f16 has all its bits. Both lie in the kernel's order, which a sum does not see.
"""

import triton
import triton.language as tl

from moequant.kernels.instructions import fma2, half_bits, pick
from moequant.kernels.products import row_start, side_of, tokens_of


@triton.jit
def _stacked(parts, COUNT: tl.constexpr):
    """COUNT (a power of two) tensors along a new last dimension."""
    for level in tl.static_range(6):
        if COUNT >> (level + 1) > 0:
            found = ()
            for i in tl.static_range(COUNT >> (level + 1)):
                found += (tl.join(parts[i], parts[i + (COUNT >> (level + 1))]),)
            parts = found
    A: tl.constexpr = parts[0].shape[0]
    B: tl.constexpr = parts[0].shape[1]
    C: tl.constexpr = parts[0].shape[2]
    return tl.reshape(parts[0], [A, B, C, COUNT])


@triton.jit
def _pairs(values, GROUPS: tl.constexpr, PIECE: tl.constexpr, WEIGHT_SCALE: tl.constexpr):
    """u32 [1, ROWS, COLUMNS, PIECE / 2]: of each pair of weights its group's f32, as f16 in both halves."""
    bits = half_bits(_stacked(values, GROUPS) * WEIGHT_SCALE)
    bits = tl.expand_dims(bits | bits << 16, 4)
    A: tl.constexpr = bits.shape[1]
    B: tl.constexpr = bits.shape[2]
    spread = tl.broadcast_to(bits, [1, A, B, GROUPS, PIECE // 2 // GROUPS])
    return tl.reshape(spread, [1, A, B, PIECE // 2])


@triton.jit
def _word(VALUE: tl.constexpr):
    return tl.full([1, 1, 1, 1], VALUE, tl.uint32)


@triton.jit
def _weights(
    code,
    scales,
    offsets,
    PIECE: tl.constexpr,
    GROUP: tl.constexpr,
    ZERO: tl.constexpr,
    MIDDLE: tl.constexpr,
    WEIGHT_SCALE: tl.constexpr,
    ISA: tl.constexpr,
):
    """f16 [1, ROWS, COLUMNS, PIECE]: pieces in the kernel's order."""
    # A code plus 128 as the fraction of an f16 at 1024; what is taken away again leaves it exact.
    biased = _stacked(code, PIECE // 4) ^ 0x80808080
    first = pick(biased, _word(0x64646464), _word(0x4140), ISA)
    second = pick(biased, _word(0x64646464), _word(0x4342), ISA)
    A: tl.constexpr = biased.shape[1]
    B: tl.constexpr = biased.shape[2]
    pair = tl.reshape(tl.join(first, second), [1, A, B, PIECE // 2])
    number = fma2(pair, _word(0x3C003C00), _word((0xE480 + ZERO + MIDDLE) * 0x00010001), ISA)
    factor = _pairs(scales, PIECE // GROUP, PIECE, WEIGHT_SCALE)
    if len(offsets) > 0:
        # What is added is smallest, and rounded least, around the middle of the codes.
        added = ()
        for g in tl.static_range(PIECE // GROUP):
            added += (offsets[g] + MIDDLE * scales[g],)
        weight = fma2(number, factor, _pairs(added, PIECE // GROUP, PIECE, WEIGHT_SCALE), ISA)
    else:
        weight = fma2(number, factor, _word(0), ISA)
    low = weight.to(tl.uint16).to(tl.float16, bitcast=True)
    high = (weight >> 16).to(tl.uint16).to(tl.float16, bitcast=True)
    return tl.reshape(tl.join(low, high), [1, A, B, PIECE])


@triton.jit
def tile_product(
    x,
    x_scale,
    data,
    side,
    out,
    order,
    expert_of,
    first_of,
    end_of,
    n_out,
    n_in,
    n_blocks,
    n_groups,
    top_k,
    DECODE: tl.constexpr,
    BLOCK: tl.constexpr,
    BYTES: tl.constexpr,
    PIECE: tl.constexpr,
    GROUP: tl.constexpr,
    ZERO: tl.constexpr,
    MIDDLE: tl.constexpr,
    PER_SCALE: tl.constexpr,
    WEIGHT_SCALE: tl.constexpr,
    ISA: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """out [pairs, n_out] = rows · x, f16 [tokens, n_in] in the kernel's order and times `x_scale`."""
    expert, pair, live = tokens_of(order, expert_of, first_of, end_of, True, TOKENS)
    busy = tl.max(live.to(tl.int32), 0)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    number = expert.to(tl.int64) * n_out + tl.minimum(n, n_out - 1)[None, :, None]
    row, skew = row_start(data, number, n_blocks, BYTES)
    pieces = n_blocks * (BLOCK // PIECE)
    DEPTH: tl.constexpr = COLUMNS * PIECE
    token = pair // top_k
    x_row = x + (token * n_in)[None, :]
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    for start in range(0, pieces * busy, COLUMNS):
        piece = tl.minimum(start + tl.arange(0, COLUMNS)[None, None, :], pieces - 1)
        beside = side_of(side, number, piece, n_groups, PER_SCALE)
        code, scales, offsets = DECODE(row, skew, piece, beside, ISA)
        weight = _weights(code, scales, offsets, PIECE, GROUP, ZERO, MIDDLE, WEIGHT_SCALE, ISA)
        weight = tl.reshape(weight, [ROWS, DEPTH])
        k = start * PIECE + tl.arange(0, DEPTH)[:, None]
        value = tl.load(x_row + k, mask=live[None, :] & (k < n_in), other=0.0)
        total = tl.dot(weight, value, total)
    total = total / (tl.load(x_scale + token)[None, :] * WEIGHT_SCALE)
    to = out + (pair * n_out)[None, :] + n[:, None]
    tl.store(to, total.to(out.dtype.element_ty), mask=live[None, :] & (n < n_out)[:, None])
