"""Tensors whose rounding is measured without a model, and the objectives it is measured by."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moequant.formats.base import Format

SHAPE = (2, 48, 2048)
"""Experts, rows, columns."""

KINDS = ("Gaussian", "heavy-tailed", "outlier columns")
IMPORTANCES = ("flat", "log-normal", "channels x100", "zeros")


def weights(kind: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """f32: uneven rows, and by kind normal values, Student's t with 4 degrees, or 1 column in 100 times 8."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g)
    if kind == "heavy-tailed":
        x /= torch.randn(4, *shape, generator=g).square().mean(0).sqrt()
    if kind == "outlier columns":
        x[..., torch.randperm(shape[-1], generator=g)[: shape[-1] // 100]] *= 8
    return 0.02 * x * torch.exp(0.3 * torch.randn(*shape[:-1], 1, generator=g))


def importance(kind: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """f32 [experts, columns]: flat, log-normal, some channels times 100, or a tenth of them at 0."""
    g = torch.Generator().manual_seed(seed)
    v = torch.ones(shape[0], shape[-1])
    if kind == "flat":
        return v
    v = torch.exp(torch.randn(v.shape, generator=g))
    some = torch.rand(v.shape, generator=g)
    if kind == "channels x100":
        v[some < 8 / shape[-1]] *= 100
    if kind == "zeros":
        v[some < 0.1] = 0
    return v


def twelve(rows: int = SHAPE[1]) -> Iterator[tuple[Tensor, Tensor]]:
    """Weights of every kind with importance of every kind; the first `rows` of each expert."""
    for i, kind in enumerate(KINDS):
        for j, form in enumerate(IMPORTANCES):
            x = weights(kind, SHAPE, 100 + i)[:, :rows].contiguous()
            yield x, importance(form, SHAPE, 200 + j)


def weighted(fmt: Format, x: Tensor, v: Tensor, magnitude: float | None = None) -> tuple[Tensor, Tensor]:
    """Blocks of x and the weights of their squared error, importance · (c·mean(x²) + x²)^(magnitude / 2), f64
    [n, block]; the format's own magnitude when None."""
    power = fmt.magnitude if magnitude is None else magnitude
    blocks = x.double().reshape(-1, fmt.block)
    square = blocks.square()
    factor = (fmt.spread * square.mean(-1, keepdim=True) + square) ** (power / 2)
    return blocks, v.double()[:, None].expand(x.shape).reshape(-1, fmt.block) * factor


def loss(fmt: Format, x: Tensor, v: Tensor, q: Tensor, magnitude: float | None = None) -> float:
    """The weighted squared error of q for x."""
    blocks, w = weighted(fmt, x, v, magnitude)
    return float((w * (blocks - q.double().reshape(-1, fmt.block)).square()).sum())
