"""What a layer is rounded towards when the quantized stream feeds it other inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moequant.rounding.paired import Grams

AT_ONCE = 2
"""Experts whose targets are solved together on a CPU. The C library gives large memory back to the system:
for eight experts 2,048 wide new pages took a fifth of the time."""

ON_DEVICES = 8
"""The same on other devices, which take long to begin."""

ROWS = 1 << 10
"""Rows that are solved for together: a head has more than a hundred thousand."""


@dataclass(frozen=True, slots=True)
class Coupling:
    """How strongly weights are corrected for what earlier rounding did to their inputs.

        W' = W + strength · (W (cross - own) + pull · Σ s r xᵀ) (own + λ·mean(diag own)·I)⁻¹

    is the least-squares answer to `W x_fp + r` from x_q, with the ridge λ = ridge + few · in / tokens:
    what few tokens ask for is not to be trusted. Strength below 1, because the same error is
    corrected again by every layer behind; strength and pull were chosen on
    held-out calibration text of one trained model, `few` on random ones with 384 and 3,840 tokens.
    """

    strength: float = 0.6
    pull: float = 0.5
    ridge: float = 0.01
    few: float = 0.3

    def target(self, weights: Tensor, grams: Grams) -> Tensor:
        """W' f32 [E, out, in] for weights [E, out, in]; experts whose Gram is useless keep theirs."""
        step = AT_ONCE if weights.device.type == "cpu" else ON_DEVICES
        parts = [slice(first, first + step) for first in range(0, len(weights), step)]
        return torch.cat([self._target(weights[part].float(), grams.of(part)) for part in parts])

    def _target(self, weights: Tensor, grams: Grams) -> Tensor:
        own, n_in = grams.own, weights.shape[-1]
        mean = own.diagonal(dim1=-2, dim2=-1).mean(-1)
        tokens = grams.tokens.to(own.device).clamp(min=1)
        ridge = (self.ridge + self.few * n_in / tokens) * mean
        change, pull = grams.cross - own, grams.pull
        damped = own
        damped.diagonal(dim1=-2, dim2=-1).add_(ridge[:, None])
        factor, failed = torch.linalg.cholesky_ex(damped)
        useful = (failed == 0) & (mean > 0)
        made = torch.empty_like(weights)
        for rows in (slice(at, at + ROWS) for at in range(0, weights.shape[1], ROWS)):
            drift = weights[:, rows] @ change
            if pull is not None:
                drift += self.pull * pull[:, rows]
            # From the right, because rows lie one after another: cholesky_solve takes a third longer.
            half = torch.linalg.solve_triangular(factor.mT, drift, upper=True, left=False)
            correction = torch.linalg.solve_triangular(factor, half, upper=False, left=False)
            useful &= correction.isfinite().all(-1).all(-1)
            made[:, rows] = weights[:, rows] + self.strength * correction
        return torch.where(useful[:, None, None], made, weights)
