# mypy: ignore-errors
# (device code: Triton's types are not Python's)
"""Activations as the vector product takes them: 16-bit integers, piece by piece in the order of the codes.

A piece (the weights a lane takes at once) of a token is a record of words:

| words | hold |
|---|---|
| PIECE / 4 | high bytes, signed: q = 256 · high + low |
| PIECE / 4 | low bytes, signed |
| PIECE / GROUP | f32: the sum of x over each group of weights that share a scale |
| 1, then padding to a multiple of 4 | f32: the scale, x = scale · q |

The largest |q| of a piece is 32512, so x is rounded by at most 2^-16 of the piece's largest. A record of
zeros follows the last piece: lanes beyond the row's end read it.
"""

import triton
import triton.language as tl

LARGEST = tl.constexpr(32512.0)  # 127 · 256: the high byte stays a signed byte when the low one is rounded


@triton.jit
def round_activations(
    x,
    order,
    out,
    n_in,
    SPAN: tl.constexpr,
    PIECE: tl.constexpr,
    GROUP: tl.constexpr,
    RECORD: tl.constexpr,
    PIECES: tl.constexpr,
):
    """x [tokens, n_in] -> records i32 [tokens, n_in / PIECE + 1, RECORD]; order i32 [SPAN] says which weight
    of SPAN a place of the kernel's order is."""
    token = tl.program_id(1).to(tl.int64)
    piece = tl.program_id(0) * PIECES + tl.arange(0, PIECES)
    place = piece[:, None] * PIECE + tl.arange(0, PIECE)[None, :]
    source = place // SPAN * SPAN + tl.load(order + place % SPAN)
    value = tl.load(x + token * n_in + source, mask=place < n_in, other=0.0).to(tl.float32)
    peak = tl.max(tl.abs(value), 1)
    inverse = LARGEST / tl.maximum(peak, 1e-30)  # whatever is smaller counts as 0
    q = tl.floor(value * inverse[:, None] + 0.5).to(tl.int32)
    high = (q + 128) >> 8
    # x - x is 0, or NaN where x is no number: a maximum may pass over those.
    scale = peak / LARGEST + tl.sum(value - value, 1)
    sums = tl.sum(tl.reshape(q, [PIECES, PIECE // GROUP, GROUP]), 2).to(tl.float32) * scale[:, None]
    count = n_in // PIECE + 1
    to = out + (token * count + piece)[:, None] * RECORD
    live = (piece < count)[:, None]
    word = tl.arange(0, PIECE // 4)[None, :]
    tl.store(to + word, _joined(high, PIECES, PIECE), mask=live)
    tl.store(to + PIECE // 4 + word, _joined(q - (high << 8), PIECES, PIECE), mask=live)
    group = tl.arange(0, PIECE // GROUP)[None, :]
    tl.store(to + PIECE // 2 + group, sums.to(tl.int32, bitcast=True), mask=live)
    last: tl.constexpr = PIECE // 2 + PIECE // GROUP
    tl.store(to + last, scale.to(tl.int32, bitcast=True)[:, None], mask=live)


@triton.jit
def _joined(value, PIECES: tl.constexpr, PIECE: tl.constexpr):
    """Four neighbouring bytes to a word."""
    shifted = tl.reshape(value & 255, [PIECES, PIECE // 4, 4]) << (tl.arange(0, 4) * 8)[None, None, :]
    return tl.sum(shifted, 2)
