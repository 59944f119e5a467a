"""Weights and Hessians to round with, and the objective in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from moequant.formats import FORMATS, Format

BLOCK_FORMATS = [f for f in FORMATS.values() if f.view]


def correlated(experts: int, rows: int, columns: int, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """weights f32 [E, rows, columns], Hessians f32 [E, columns, columns] of inputs that share directions."""
    g = torch.Generator().manual_seed(seed)
    rank = max(4, columns // 4)
    shared = torch.randn(experts, tokens, rank, generator=g) @ torch.randn(
        experts, rank, columns, generator=g
    )
    x = 0.8 * shared / rank**0.5 + 0.6 * torch.randn(experts, tokens, columns, generator=g)
    x = x * torch.exp(0.5 * torch.randn(experts, 1, columns, generator=g))
    return 0.02 * torch.randn(experts, rows, columns, generator=g), x.mT @ x


def lost(fmt: Format, weights: Tensor, data: Tensor, hessian: Tensor) -> Tensor:
    """f64 [E]: tr(E H Eᵀ) of packed data, by the format's own decoder."""
    decoded = fmt.decode(data.reshape(-1, fmt.block_bytes)).view(weights.shape)
    e = weights.double() - decoded.double()
    return torch.einsum("eoi,eij,eoj->e", e, hessian.double(), e)
