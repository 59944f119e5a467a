"""x times packed weights, dense or routed to experts. This module imports Triton; import it when it is used.

    grouped_matmul(x [tokens, in], matrix (E, out, in), experts i64 [tokens, k]) -> [tokens, k, out]

On a machine without a GPU the same kernels run in Triton's interpreter, when TRITON_INTERPRET=1
was set before Triton was first imported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton  # type: ignore[import-untyped]
from torch import Tensor

from moequant.errors import FormatError
from moequant.kernels import integer, iq4_xs, mxfp4, q2_k, q3_k, q4_k, q5_k, q6_k, q8_0
from moequant.kernels.matrix import Matrix
from moequant.kernels.products import tile_product, vector_product

VECTOR_TOKENS = 16
"""Up to so many tokens the product is bound by the bytes of the weights, and vectors do."""

LARGEST_WEIGHT = 256.0
"""f16 operands are scaled for weights up to this size; above 2^-21 they keep all 11 bits."""


@dataclass(frozen=True, slots=True)
class Decoder:
    """A format's tile decoder: `block` weights in `bytes`, `width` neighbouring weights a call."""

    decode: Callable[..., Any]
    block: int
    bytes: int
    width: int


DECODERS = {
    "Q8_0": Decoder(q8_0.decode, q8_0.BLOCK, q8_0.BYTES, q8_0.WIDTH),
    "Q6_K": Decoder(q6_k.decode, q6_k.BLOCK, q6_k.BYTES, q6_k.WIDTH),
    "Q5_K": Decoder(q5_k.decode, q5_k.BLOCK, q5_k.BYTES, q5_k.WIDTH),
    "Q4_K": Decoder(q4_k.decode, q4_k.BLOCK, q4_k.BYTES, q4_k.WIDTH),
    "Q3_K": Decoder(q3_k.decode, q3_k.BLOCK, q3_k.BYTES, q3_k.WIDTH),
    "Q2_K": Decoder(q2_k.decode, q2_k.BLOCK, q2_k.BYTES, q2_k.WIDTH),
    "IQ4_XS": Decoder(iq4_xs.decode, iq4_xs.BLOCK, iq4_xs.BYTES, iq4_xs.WIDTH),
    "MXFP4": Decoder(mxfp4.decode, mxfp4.BLOCK, mxfp4.BYTES, mxfp4.WIDTH),
    "INT4": Decoder(integer.decode4, integer.BLOCK, integer.BYTES4, integer.WIDTH),
    "INT8": Decoder(integer.decode8, integer.BLOCK, integer.BYTES8, integer.WIDTH),
}


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program takes: tokens of one expert, rows of the matrix, blocks of a row at once.

    `vector` chooses the product; tokens, rows and blocks are powers of two.
    """

    vector: bool
    tokens: int
    rows: int
    blocks: int
    warps: int


@dataclass(frozen=True, slots=True)
class Schedule:
    """Which program serves which tokens, made once for all matrices of an MoE block.

    `order` i32 [pairs] are (token, choice) pairs sorted by expert; program i takes up to
    `tokens` of them, from `first[i]`, below `end[i]`, for `expert[i]`. With one token a
    program nothing is sorted: program i serves pair i, and `order` is None.
    """

    tokens: int
    expert: Tensor
    order: Tensor | None
    first: Tensor | None
    end: Tensor | None


def schedule(experts: Tensor, n_experts: int, tile: Tile) -> Schedule:
    """The schedule of expert ids [tokens, k] on their device, without waiting for it (shapes are bounds)."""
    ids, tokens = experts.reshape(-1).long(), tile.tokens
    pairs = ids.numel()
    if tokens == 1 and tile.vector:
        return Schedule(1, ids.int(), None, None, None)
    counts = torch.zeros(n_experts, dtype=torch.int64, device=ids.device)
    counts.scatter_add_(0, ids, torch.ones_like(ids))
    ends, works = counts.cumsum(0), (counts + tokens - 1) // tokens
    work_ends = works.cumsum(0)
    bound = min(pairs, (pairs + min(n_experts, pairs) * (tokens - 1)) // tokens)
    work = torch.arange(bound, device=ids.device)
    expert = torch.searchsorted(work_ends, work, right=True)
    idle = expert >= n_experts
    expert = expert.clamp(max=n_experts - 1)
    first = (ends - counts)[expert] + (work - (work_ends - works)[expert]) * tokens
    end = torch.where(idle, torch.zeros_like(first), ends[expert])
    order = torch.argsort(ids, stable=True)
    return Schedule(tokens, expert.int(), order.int(), first.int(), end.int())


def choose_tile(matrix: Matrix, tokens: int, top_k: int) -> Tile:
    """A tile for that many tokens: sized so that most experts' tokens fit one program."""
    decoder, n_in = DECODERS[matrix.format], matrix.shape[2]
    n_blocks = triton.next_power_of_2(n_in // decoder.block)
    expected = triton.next_power_of_2(-(-tokens * top_k // matrix.shape[0]))
    if tokens <= VECTOR_TOKENS:
        served = min(expected, triton.next_power_of_2(tokens))
        blocks = min(n_blocks, 512 // decoder.width if decoder.block == 32 else 4)
        rows = 4 if served > 8 else 8
        return Tile(True, served, rows, blocks, warps=2 if served == 1 and decoder.block == 256 else 4)
    return Tile(False, min(max(expected, 16), 64), 64, min(n_blocks, 64 // decoder.width), warps=4)


def grouped_matmul(
    x: Tensor,
    matrix: Matrix,
    experts: Tensor,
    *,
    tile: Tile | None = None,
    plan: Schedule | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Each token times each of its experts: x [tokens, in], experts [tokens, k] -> [tokens, k, out].

    `plan` is the schedule of `experts` for a tile of as many tokens, when it is at hand.
    FormatError when shapes do not fit or the format has no kernel.
    """
    if matrix.format not in DECODERS:
        raise FormatError(f"{matrix.format} has no kernel; there are {', '.join(DECODERS)}")
    n_experts, n_out, n_in = matrix.shape
    if x.ndim != 2 or x.shape[1] != n_in or experts.shape[:1] != x.shape[:1] or experts.ndim != 2:
        raise FormatError(
            f"x {list(x.shape)} and experts {list(experts.shape)} do not fit weights {list(matrix.shape)}"
        )
    tokens, top_k = experts.shape
    out = torch.empty(tokens, top_k, n_out, dtype=dtype, device=x.device)
    if not out.numel():
        return out
    tile = choose_tile(matrix, tokens, top_k) if tile is None else tile
    plan = schedule(experts, n_experts, tile) if plan is None else plan
    _launch(x.contiguous(), matrix, out, tile, plan)
    return out


def matmul(x: Tensor, matrix: Matrix, *, tile: Tile | None = None) -> Tensor:
    """x [tokens, in] times one matrix (E = 1) -> f32 [tokens, out]."""
    return grouped_matmul(x, matrix, x.new_zeros((len(x), 1), dtype=torch.int64), tile=tile)[:, 0]


def _launch(x: Tensor, matrix: Matrix, out: Tensor, tile: Tile, plan: Schedule) -> None:
    decoder = DECODERS[matrix.format]
    _, n_out, n_in = matrix.shape
    n_blocks = n_in // decoder.block
    scales = None if matrix.scales is None else matrix.scales.contiguous()
    per_scale = 1 if scales is None else n_blocks // scales.shape[2]
    data = matrix.data.contiguous()
    work = (plan.order, plan.expert, plan.first, plan.end)
    sizes = (per_scale, n_out, n_in, n_blocks, out.shape[1])
    grid = (triton.cdiv(n_out, tile.rows), plan.expert.numel())
    shape = {
        "DECODE": decoder.decode,
        "BLOCK": decoder.block,
        "BYTES": decoder.bytes,
        "WIDTH": decoder.width,
        "TOKENS": tile.tokens,
        "ROWS": tile.rows,
        "BLOCKS": tile.blocks,
        "num_warps": tile.warps,
    }
    if tile.vector:
        vector_product[grid](x, data, scales, out, *work, *sizes, SORTED=plan.order is not None, **shape)
        return
    tile_product[grid](
        x, _powers(x), data, scales, out, *work, *sizes, 2.0**15 / LARGEST_WEIGHT, num_stages=2, **shape
    )


def _powers(x: Tensor) -> Tensor:
    """f32 [tokens]: powers of two that bring each row's largest value to 2^14 … 2^15 (rows of zeros: 1)."""
    peak = x.abs().amax(1).float()
    _, exponent = torch.frexp(peak)
    return torch.where(peak > 0, torch.exp2(15.0 - exponent.float()), 1.0)
