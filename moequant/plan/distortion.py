"""Weights that are off as much as a format would make them, for a fraction of what its search costs.

A probe asks how much the model minds an error of a known size in a weight. Which codes make the
error hardly matters, so none are searched. Weights are rounded to even steps, and the difference is
stretched to the size that was measured for the format.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

BLOCK = 32
"""Weights of a row that share a step, as those of most formats share a scale."""

AT_ONCE = 1 << 20
"""Weights that are handled at a time: a head has gigabytes. A constant, so that memory decides nothing."""


def distorted(values: Tensor, error: float, columns: Tensor | None) -> Tensor:
    """`values` [..., rows, in] with the relative squared `error` of a format's rounding, f32.

    Squares count by `columns` [..., in], the importance of inputs; None: alike. Every matrix, and of a large
    one every run of rows, is off by exactly `error`. Where all that counts is zero, nothing changes.

    The error is that of rounding to even steps, alike in all blocks. No block has the gain of least squared
    error: it would shrink weights, which formats do not do either (`Format.gain`), and such probes found
    attention's values up to twice as sensitive.
    """
    stack = values.reshape(-1, *values.shape[-2:])
    shares = torch.ones(1, values.shape[-1], device=values.device)
    if columns is not None:
        shares = columns.reshape(-1, values.shape[-1]).to(values.device, torch.float32)
    out = torch.empty(stack.shape, dtype=torch.float32, device=values.device)
    step = max(1, AT_ONCE // values.shape[-1])
    for kept, share, made in zip(stack, shares.expand(len(stack), -1), out, strict=True):
        for first in range(0, len(kept), step):
            rows = slice(first, first + step)
            _off(made[rows].copy_(kept[rows]), error, share)
    return out.view(values.shape)


def _off(x: Tensor, error: float, share: Tensor) -> None:
    """Move rows x f32 [rows, in] off by `error`, in place, where columns count by `share` f32 [in]."""
    square = x.square()
    # Even steps of a size s make errors of s²/12 in the mean.
    steps = _by_block(square).mean(-1, keepdim=True).mul_(12 * error).sqrt_()
    steps.clamp_(min=torch.finfo(torch.float32).tiny)
    off = (_by_block(x) / steps).round_().mul_(steps).flatten(1)[:, : x.shape[1]].sub_(x)
    whole = (square @ share).sum(dtype=torch.float64)
    made = (torch.mul(off, off, out=square) @ share).sum(dtype=torch.float64)
    if made > 0:
        x.add_(off.mul_((error * whole / made).sqrt().float()))


def _by_block(x: Tensor) -> Tensor:
    """[rows, in] as [rows, blocks, BLOCK], a last block filled up with zeros."""
    pad = -x.shape[1] % BLOCK
    return (nn.functional.pad(x, (0, pad)) if pad else x).view(len(x), -1, BLOCK)
