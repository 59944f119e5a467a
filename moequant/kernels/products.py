# mypy: ignore-errors
# (device code: Triton's types are not Python's)
"""The two products, for any format: a vector path for few tokens, a tensor-core path for many.

Both walk a row's blocks and take each in parts of WIDTH neighbouring weights that one call of
DECODE yields. Tiles hold "units", a unit being one block of one row: BLOCKS neighbouring blocks
of ROWS rows, so that enough bytes are under way. A program serves at most TOKENS tokens of one
expert; which, `order`, `expert_of`, `first_of` and `end_of` say (`matmul.Schedule`).
"""

import triton
import triton.language as tl


@triton.jit
def _tokens(order, expert_of, first_of, end_of, SORTED: tl.constexpr, TOKENS: tl.constexpr):
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
def _decode(data, scales, index, per_scale, part, DECODE: tl.constexpr, BYTES: tl.constexpr):
    """f32 [U, WIDTH]: part `part` of the blocks of numbers `index` i32 [U, 1] in the whole tensor."""
    block = data + index.to(tl.int64) * BYTES
    if scales is None:
        return DECODE(block, None, part)
    else:
        return DECODE(block, scales + index // per_scale, part)


@triton.jit
def vector_product(
    x,
    data,
    scales,
    out,
    order,
    expert_of,
    first_of,
    end_of,
    per_scale,
    n_out,
    n_in,
    n_blocks,
    top_k,
    DECODE: tl.constexpr,
    BLOCK: tl.constexpr,
    BYTES: tl.constexpr,
    WIDTH: tl.constexpr,
    SORTED: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """out [pairs, n_out] = decoded row · x [tokens, n_in] in f32; sums run per lane until the row ends."""
    expert, pair, live = _tokens(order, expert_of, first_of, end_of, SORTED, TOKENS)
    busy = tl.max(live.to(tl.int32), 0)  # the schedule's bound leaves programs without any token
    unit = tl.arange(0, ROWS * BLOCKS)
    row = tl.program_id(0) * ROWS + unit // BLOCKS
    # Beyond the last row or block the last one is read again, and not stored or multiplied by 0.
    at = (expert * n_out + tl.minimum(row, n_out - 1)) * n_blocks
    beside = tl.arange(0, BLOCKS)
    x_row = x + (pair // top_k * n_in)[:, None, None]
    total = tl.zeros([TOKENS, ROWS, BLOCKS, WIDTH], tl.float32)
    for start in range(0, n_blocks * busy, BLOCKS):
        inside = live[:, None, None] & (start + beside < n_blocks)[None, :, None]
        index = (at + tl.minimum(start + unit % BLOCKS, n_blocks - 1))[:, None]
        for part in tl.static_range(BLOCK // WIDTH):
            weight = _decode(data, scales, index, per_scale, part, DECODE, BYTES)
            k = (start + beside)[:, None] * BLOCK + part * WIDTH + tl.arange(0, WIDTH)[None, :]
            # [TOKENS, BLOCKS, WIDTH], shared by the rows.
            value = tl.load(x_row + k[None, :, :], mask=inside, other=0.0).to(tl.float32)
            weight = tl.reshape(weight, [1, ROWS, BLOCKS, WIDTH])
            total += weight * value[:, None, :, :]
    result = tl.sum(tl.sum(total, 3), 2)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    to = out + (pair * n_out)[:, None] + n[None, :]
    tl.store(to, result.to(out.dtype.element_ty), mask=live[:, None] & (n < n_out)[None, :])


@triton.jit
def tile_product(
    x,
    x_scale,
    data,
    scales,
    out,
    order,
    expert_of,
    first_of,
    end_of,
    per_scale,
    n_out,
    n_in,
    n_blocks,
    top_k,
    weight_scale,
    DECODE: tl.constexpr,
    BLOCK: tl.constexpr,
    BYTES: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """The same by tensor cores: f16 operands, f32 sums.

    bf16 operands would round weights by up to 2^-9 and miss 1e-3. Powers of two, `x_scale`
    [tokens] and `weight_scale`, bring both operands to where f16 has all its bits.
    """
    expert, pair, live = _tokens(order, expert_of, first_of, end_of, True, TOKENS)
    busy = tl.max(live.to(tl.int32), 0)
    unit = tl.arange(0, ROWS * BLOCKS)
    row = tl.program_id(0) * ROWS + unit // BLOCKS
    at = (expert * n_out + tl.minimum(row, n_out - 1)) * n_blocks
    token = pair // top_k
    grow = tl.load(x_scale + token)[:, None]
    column = tl.arange(0, BLOCKS * WIDTH)
    total = tl.zeros([TOKENS, ROWS], tl.float32)
    for start in range(0, n_blocks * busy, BLOCKS):
        index = (at + tl.minimum(start + unit % BLOCKS, n_blocks - 1))[:, None]
        block = start + column // WIDTH
        inside = live[:, None] & (block < n_blocks)[None, :]
        for part in tl.static_range(BLOCK // WIDTH):
            weight = _decode(data, scales, index, per_scale, part, DECODE, BYTES) * weight_scale
            weight = tl.reshape(weight.to(tl.float16), [ROWS, BLOCKS * WIDTH])
            k = block * BLOCK + part * WIDTH + column % WIDTH
            value = tl.load(x + (token * n_in)[:, None] + k[None, :], mask=inside, other=0.0)
            value = (value.to(tl.float32) * grow).to(tl.float16)
            total = tl.dot(value, tl.trans(weight), total)
    total = total / (grow * weight_scale)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    to = out + (pair * n_out)[:, None] + n[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=live[:, None] & (n < n_out)[None, :])
