"""x times packed weights, dense or routed to experts. This module imports Triton; import it when it is used.

    grouped_matmul(x [tokens, in], matrix (E, out, in), experts i64 [tokens, k]) -> [tokens, k, out]

On a machine without a GPU the same kernels run in Triton's interpreter, when TRITON_INTERPRET=1
was set before Triton was first imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton  # type: ignore[import-untyped]
from torch import Tensor

from moequant.errors import FormatError, few
from moequant.formats.rows import points
from moequant.kernels.activations import round_activations
from moequant.kernels.decoders import DECODERS, Decoder
from moequant.kernels.matrix import Matrix
from moequant.kernels.products import vector_product
from moequant.kernels.routing import Schedule, grouped, unsorted
from moequant.kernels.tiles import tile_product

VECTOR_TOKENS = 4
"""Up to so many tokens an expert the product is bound by the bytes of the weights, and vectors do."""

LARGEST_WEIGHT = 256.0
"""f16 operands of tensor cores are scaled for weights up to this size."""

WEIGHT_SCALE = 2.0**15 / LARGEST_WEIGHT


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program takes: tokens of one expert, rows of the matrix, pieces of a row at once.

    `vector` chooses the product; tokens, rows, columns and warps are powers of two. With vectors each lane
    takes `rows` rows, and the lanes beside `columns` take others.
    """

    vector: bool
    tokens: int
    rows: int
    columns: int
    warps: int

    @property
    def lanes(self) -> int:
        """Threads of a program: AMD's warps have 64."""
        return self.warps * (64 if torch.version.hip else 32)

    @property
    def rows_a_program(self) -> int:
        """Rows of the matrix that one program serves."""
        return self.rows * self.lanes // self.columns if self.vector else self.rows


def schedule(experts: Tensor, n_experts: int, tile: Tile) -> Schedule:
    """The schedule of expert ids [tokens, k] for a tile."""
    return unsorted(experts) if tile.vector and tile.tokens == 1 else grouped(experts, n_experts, tile.tokens)


def choose_tile(matrix: Matrix, tokens: int, top_k: int) -> Tile:
    """A tile for that many tokens: sized so that most experts' tokens fit one program."""
    expected = triton.next_power_of_2(-(-tokens * top_k // matrix.shape[0]))
    return tile_for(DECODERS[matrix.format], matrix.shape[2], min(expected, triton.next_power_of_2(tokens)))


def arithmetic(matrix: Matrix, tokens: int, top_k: int) -> str:
    """How a product of that many tokens is computed, in words."""
    if choose_tile(matrix, tokens, top_k).vector:
        return "16-bit activations, integer sums"
    return "f16 activations and weights, f32 sums"


def tile_for(decoder: Decoder, n_in: int, tokens: int) -> Tile:
    """A tile for experts of `tokens` (a power of two) tokens each.

    Vectors: the lanes of a warp walk a row together, fewer of them where some would be idle.
    """
    if tokens > VECTOR_TOKENS:
        return Tile(False, min(max(tokens, 16), 64), 64, max(2, 64 // decoder.piece), warps=4)
    pieces = n_in // decoder.piece
    columns = 32
    while columns > 4 and -(-pieces // columns) * columns > 1.15 * pieces:
        columns //= 2
    return Tile(True, tokens, 4 if tokens <= 2 else 2, columns, warps=4)


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
        raise FormatError(f"{matrix.format} has no kernel; there are {few(DECODERS)}")
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
    if tile.vector:
        _launch_vectors(x.contiguous(), matrix, out, tile, plan)
    else:
        _launch_tiles(x, matrix, out, tile, plan)
    return out


def _launch_vectors(x: Tensor, matrix: Matrix, out: Tensor, tile: Tile, plan: Schedule) -> None:
    decoder = DECODERS[matrix.format]
    n_out, n_in = matrix.shape[1:]
    grid = (triton.cdiv(n_out, tile.rows_a_program), plan.expert.numel())
    side, n_groups, per_scale = _beside(matrix)
    vector_product[grid](
        records(x, decoder),
        _words(matrix.data),
        side,
        out,
        *(plan.order, plan.expert, plan.first, plan.end),
        *(n_out, n_in // decoder.block, n_groups, out.shape[1]),
        **constants(decoder, per_scale, isa(), tile),
        SORTED=plan.order is not None,
        RECORD=decoder.record,
        LANES=tile.lanes,
        num_warps=tile.warps,
        enable_fp_fusion=True,
    )


def _launch_tiles(x: Tensor, matrix: Matrix, out: Tensor, tile: Tile, plan: Schedule) -> None:
    decoder = DECODERS[matrix.format]
    n_out, n_in = matrix.shape[1:]
    grid = (triton.cdiv(n_out, tile.rows_a_program), plan.expert.numel())
    side, n_groups, per_scale = _beside(matrix)
    halves, x_scale = _halves(x, decoder)
    tile_product[grid](
        halves,
        x_scale,
        _words(matrix.data),
        side,
        out,
        *(plan.order, plan.expert, plan.first, plan.end),
        *(n_out, n_in, n_in // decoder.block, n_groups, out.shape[1]),
        **constants(decoder, per_scale, isa(), tile),
        MIDDLE=decoder.middle,
        WEIGHT_SCALE=WEIGHT_SCALE,
        num_warps=tile.warps,
        num_stages=2,
        enable_fp_fusion=True,
    )


def constants(decoder: Decoder, per_scale: int, isa: str, tile: Tile) -> dict[str, Any]:
    """What both kernels are compiled for."""
    return {
        "DECODE": decoder.decode,
        "BLOCK": decoder.block,
        "BYTES": decoder.bytes,
        "PIECE": decoder.piece,
        "GROUP": decoder.group,
        "ZERO": decoder.zero,
        "PER_SCALE": per_scale,
        "ISA": isa,
        "TOKENS": tile.tokens,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
    }


def isa() -> str:
    """Whose instructions the kernels may name: see `instructions.py`."""
    if triton.knobs.runtime.interpret:
        return "none"
    return "gcn" if torch.version.hip else "ptx"


def records(x: Tensor, decoder: Decoder) -> Tensor:
    """x [tokens, in] as the vector product takes it: i32 [tokens, pieces + 1, record] (`activations.py`)."""
    tokens, n_in = x.shape
    count, together = n_in // decoder.piece + 1, 8
    out = torch.empty(tokens, count, decoder.record, dtype=torch.int32, device=x.device)
    round_activations[(triton.cdiv(count, together), tokens)](
        x,
        _order(decoder.order, str(x.device)),
        out,
        n_in,
        SPAN=len(decoder.order),
        PIECE=decoder.piece,
        GROUP=decoder.group,
        RECORD=decoder.record,
        PIECES=together,
        enable_fp_fusion=True,
    )
    return out


def _halves(x: Tensor, decoder: Decoder) -> tuple[Tensor, Tensor]:
    """(f16 x in the kernel's order, f32 [tokens] powers of two that it is multiplied by).

    They bring each row's largest value to 2^14 … 2^15; rows of zeros keep theirs.
    """
    peak = x.abs().amax(1).float()
    _, exponent = torch.frexp(peak)
    scale = torch.where(peak > 0, torch.exp2(15.0 - exponent.float()), 1.0)
    order = _order(decoder.order, str(x.device))
    scaled = (x.float() * scale[:, None]).half()
    return scaled.view(len(x), -1, len(order))[:, :, order].flatten(1), scale


@cache
def _order(order: tuple[int, ...], device: str) -> Tensor:
    return torch.tensor(order, dtype=torch.int32, device=device)


@cache
def _grid(name: str, device: str) -> Tensor:
    """The rows of a grid as words of signed bytes."""
    return points(name).to(torch.int8).contiguous().view(torch.int32).flatten().to(device)


def _beside(matrix: Matrix) -> tuple[Tensor | None, int, int]:
    """(what lies apart: scales, a grid or nothing; scales a row; pieces that share a scale, 0 without)."""
    decoder = DECODERS[matrix.format]
    if matrix.scales is not None:
        groups = matrix.scales.shape[2]
        return matrix.scales.contiguous(), groups, matrix.shape[2] // groups // decoder.piece
    return (_grid(decoder.grid, str(matrix.data.device)) if decoder.grid else None), 1, 0


def _words(data: Tensor) -> Tensor:
    """Bytes as whole words at an aligned address; copied where they do not lie so."""
    data = data.contiguous().flatten()
    if data.numel() % 4:
        data = torch.nn.functional.pad(data, (0, -data.numel() % 4))
    return (data if data.data_ptr() % 16 == 0 else data.clone()).view(torch.int32)
