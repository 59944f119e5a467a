# mypy: ignore-errors
# (device code: Triton's types are not Python's)
"""The product for few tokens, for any format: bound by the bytes of the weights.

A lane takes one piece of a row at a time, and that of ROWS rows; COLUMNS neighbouring lanes walk a row
together, so that their loads join. Codes are multiplied as they are: four signed bytes an instruction by
the high bytes of 16-bit activations, then by the low bytes, with integer sums that are exact. Only a
group's sum becomes a float, and is scaled. A program serves at most TOKENS tokens of one expert; which,
`order`, `expert_of`, `first_of` and `end_of` say (`routing.Schedule`).
"""

import triton
import triton.language as tl

from moequant.kernels.fields import wide
from moequant.kernels.instructions import dot4


@triton.jit
def tokens_of(order, expert_of, first_of, end_of, SORTED: tl.constexpr, TOKENS: tl.constexpr):
    """(expert i32, pairs i64 [TOKENS], which of them are real)."""
    work = tl.program_id(1)
    expert = tl.load(expert_of + work)
    slots = tl.arange(0, TOKENS)
    if SORTED:
        first = tl.load(first_of + work)
        live = first + slots < tl.load(end_of + work)
        pair = tl.load(order + first + slots, mask=live, other=0).to(tl.int64)
    else:
        live = slots < 1
        pair = slots.to(tl.int64) * 0 + work
    return expert, pair, live


@triton.jit
def row_start(data, number, n_blocks, BYTES: tl.constexpr):
    """(pointer to the word where row `number` i64 starts, bytes from there)."""
    if BYTES % 4 == 0:  # the compiler sees how far such rows are aligned
        return data + number * n_blocks * (BYTES // 4), 0
    else:
        first = number * n_blocks * BYTES
        return data + (first >> 2), (first & 3).to(tl.int32)


@triton.jit
def side_of(side, number, piece, n_groups, PER_SCALE: tl.constexpr):
    """What a decoder needs beside the row: the scale's place in a row of n_groups, or `side` as it is."""
    if PER_SCALE:
        return side + number * n_groups + piece // PER_SCALE
    else:
        return side


@triton.jit
def _record(at, RECORD: tl.constexpr):
    """RECORD words of activations."""
    found = ()
    for i in tl.static_range(RECORD // 4):
        found += wide(at + 4 * i, 4)
    return found


@triton.jit
def _group_sum(code, record, g: tl.constexpr, PIECE: tl.constexpr, GROUP: tl.constexpr, ISA: tl.constexpr):
    """i32: codes times activations of group g."""
    zero = tl.zeros([1, 1, 1], tl.int32)
    total = zero
    for i in tl.static_range(GROUP // 4):
        total = dot4(code[g * (GROUP // 4) + i], record[g * (GROUP // 4) + i], total, ISA)
    total = total * 256
    for i in tl.static_range(GROUP // 4):
        total = dot4(code[g * (GROUP // 4) + i], record[PIECE // 4 + g * (GROUP // 4) + i], total, ISA)
    return total


@triton.jit
def _piece_product(
    code,
    scales,
    offsets,
    record,
    PIECE: tl.constexpr,
    GROUP: tl.constexpr,
    ZERO: tl.constexpr,
    ISA: tl.constexpr,
):
    """f32: a piece of a row times that of a token."""
    GROUPS: tl.constexpr = PIECE // GROUP
    x_scale = record[PIECE // 2 + GROUPS].to(tl.float32, bitcast=True)
    total = 0.0
    for g in tl.static_range(GROUPS):
        x_sum = record[PIECE // 2 + g].to(tl.float32, bitcast=True)
        # The scale of x first: the product is then as large as the weights', which may be near f32's ends.
        value = _group_sum(code, record, g, PIECE, GROUP, ISA).to(tl.float32) * x_scale
        if ZERO != 0:
            value = value - ZERO * x_sum
        total += scales[g] * value
        if len(offsets) > 0:
            total += offsets[g] * x_sum
    return total


@triton.jit
def vector_product(
    x,
    data,
    side,
    out,
    order,
    expert_of,
    first_of,
    end_of,
    n_out,
    n_blocks,
    n_groups,
    top_k,
    DECODE: tl.constexpr,
    BLOCK: tl.constexpr,
    BYTES: tl.constexpr,
    PIECE: tl.constexpr,
    GROUP: tl.constexpr,
    ZERO: tl.constexpr,
    RECORD: tl.constexpr,
    PER_SCALE: tl.constexpr,
    ISA: tl.constexpr,
    SORTED: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
):
    """out [pairs, n_out] = row · x, whose records (`activations.py`) `x` points to; sums run per lane."""
    expert, pair, live = tokens_of(order, expert_of, first_of, end_of, SORTED, TOKENS)
    busy = tl.max(live.to(tl.int32), 0)  # the schedule's bound leaves programs without any token
    SIDE: tl.constexpr = LANES // COLUMNS
    lane = tl.arange(0, LANES)[None, None, :]
    n = tl.program_id(0) * (ROWS * SIDE) + tl.arange(0, ROWS)[None, :, None] * SIDE + lane // COLUMNS
    # Beyond the last row the last one is read again, and not stored.
    number = expert.to(tl.int64) * n_out + tl.minimum(n, n_out - 1)
    row, skew = row_start(data, number, n_blocks, BYTES)
    pieces = n_blocks * (BLOCK // PIECE)
    x_row = x + (pair // top_k * (pieces + 1) * RECORD)[:, None, None]
    total = tl.zeros([TOKENS, ROWS, LANES], tl.float32)
    for start in range(0, pieces * busy, COLUMNS):
        piece = start + lane % COLUMNS
        # Beyond the last piece of activations lies one of zeros.
        record = _record(x_row + tl.minimum(piece, pieces) * RECORD, RECORD)
        piece = tl.minimum(piece, pieces - 1)
        beside = side_of(side, number, piece, n_groups, PER_SCALE)
        code, scales, offsets = DECODE(row, skew, piece, beside, ISA)
        total += _piece_product(code, scales, offsets, record, PIECE, GROUP, ZERO, ISA)
    result = tl.sum(tl.reshape(total, [TOKENS, ROWS, SIDE, COLUMNS]), 3)
    n = tl.program_id(0) * (ROWS * SIDE) + tl.arange(0, ROWS)[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
    to = out + (pair * n_out)[:, None, None] + n[None, :, :]
    tl.store(to, result.to(out.dtype.element_ty), mask=live[:, None, None] & (n < n_out)[None, :, :])
