"""Scales: which block of a matrix each of them serves, and reading those of a few rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from moequant.checkpoint.codecs.base import damaged, read_part
from moequant.errors import CheckpointError
from moequant.values import TensorRef

_USUAL = 128
"""Sides of DeepSeek's FP8 blocks: tried first where nothing is declared, since the last may be cropped."""


@dataclass(frozen=True, slots=True)
class Grid:
    """A scale for each block of `rows` x `columns` weights; the last blocks are cropped at the edges.

    `rank_rows` > 0: the matrix is that many rows of each of several ranks, and blocks start anew with each
    (MiMo's qkv_proj, saved as its tensor-parallel ranks held it).
    """

    rows: int
    columns: int
    rank_rows: int = 0

    def read(self, ref: TensorRef, index: int | None, rows: range) -> Tensor:
        """The scales of each row, f32 [len(rows), blocks in a row]; see `numbers` for errors.

        `ref` is [blocks, blocks] for a matrix or all of a stack, [E, blocks, blocks] for a stack.
        """
        at = torch.arange(rows.start, rows.stop)
        if self.rank_rows:
            rank = at // self.rank_rows
            at = rank * -(-self.rank_rows // self.rows) + (at - rank * self.rank_rows) // self.rows
        else:
            at = at // self.rows
        first, last = (int(at[0]), int(at[-1])) if len(rows) else (0, -1)
        found = numbers(ref, index if len(ref.shape) == 3 else None, range(first, last + 1))
        return found[at - first]


def numbers(ref: TensorRef, index: int | None = None, rows: range | None = None) -> Tensor:
    """Stored scales as f32. CheckpointError when one is NaN or infinite."""
    found = read_part(ref, index, rows).to(torch.float32)
    if bad := int((~torch.isfinite(found)).sum()):
        raise damaged(ref.name, f"{bad} of {found.numel()} scales are NaN or infinite, numbers were expected")
    return found


def spread(scales: Tensor, columns: int, n_in: int) -> Tensor:
    """Scales [n, blocks] of `columns` weights each as [n, n_in], or as they are when one serves the row."""
    return scales if scales.shape[1] == 1 else scales.repeat_interleave(columns, 1)[:, :n_in]


def scaled(values: Tensor, scales: Tensor, columns: int) -> Tensor:
    """Values [n, in], multiplied in place by scales [n, blocks] of `columns` weights each."""
    n, n_in = values.shape
    if scales.shape[1] * columns == n_in:  # no copy of the scales as large as the values
        values.view(n, -1, columns).mul_(scales[..., None])
        return values
    return values.mul_(spread(scales, columns, n_in))


def as_grid(ref: TensorRef, shape: tuple[int, ...], turned: bool = False) -> TensorRef:
    """The scales of a weight of `shape` as [blocks, blocks] or [E, blocks, blocks], U8 taken as E8M0.

    One number serves all; [E] or [E, 1] one matrix each; [out] or [E, out] one row each. Of a stack
    [E, in, out], scales [E, out] are for its columns. `turned` says that it is one: squares do not tell.
    CheckpointError when they have another number of dimensions.
    """
    dtype = "F8_E8M0" if ref.dtype == "U8" else ref.dtype
    stack = shape[:-2]
    if len(ref.shape) == 4 and ref.shape[1::2] == (1, 1):  # ModelOpt's FP8_PB_WO
        ref = replace(ref, shape=ref.shape[::2])
    if prod(ref.shape) == 1:
        return replace(ref, shape=(1, 1), dtype=dtype)
    if stack and ref.shape[0] == stack[0] == prod(ref.shape):
        return replace(ref, shape=(*stack, 1, 1), dtype=dtype)
    of_columns = bool(stack) and ref.shape == (*stack, shape[-1])
    if ref.shape == shape[:-1] and not (of_columns and turned):
        return replace(ref, shape=(*ref.shape, 1), dtype=dtype)
    if of_columns:
        return replace(ref, shape=(*stack, 1, shape[-1]), dtype=dtype)
    if len(ref.shape) != len(shape) or ref.shape[:-2] != stack:
        raise misfit(ref, shape, "one for each block of rows and columns")
    return replace(ref, dtype=dtype)


def fit(ref: TensorRef, shape: tuple[int, ...], block: tuple[int, int] | None) -> Grid:
    """The blocks that scales in `as_grid`'s form serve; `block` is what the config declares (0: all).

    CheckpointError when their count is not that of the blocks.
    """
    counts = ref.shape[-2:]
    if block is None:
        found = tuple(_step(n, count) for n, count in zip(shape[-2:], counts, strict=True))
    else:
        sizes = tuple(b or n for b, n in zip(block, shape[-2:], strict=True))
        fits = all(-(-n // b) == c for n, b, c in zip(shape[-2:], sizes, counts, strict=True))
        found = sizes if fits else (0, 0)
    rows, columns = found
    if not rows or not columns:
        said = f"blocks of {list(block)} (0: all)" if block else "blocks that divide it"
        raise misfit(ref, shape, said)
    return Grid(rows, columns)


def misfit(ref: TensorRef, shape: tuple[int, ...], expected: str) -> CheckpointError:
    """The error for scales that do not belong to a weight of `shape`."""
    return CheckpointError(
        f"tensor {ref.name} is {list(ref.shape)} for a weight of {list(shape)}, expected {expected}; "
        "check quantization_config and that all files are of one download"
    )


def _step(n: int, count: int) -> int:
    """Rows or columns of a block when `count` blocks make n; 0 when that cannot be told."""
    if count == 1:
        return n
    if -(-n // _USUAL) == count:
        return _USUAL
    return n // count if n % count == 0 else 0
