"""From sums over calibration tokens to the importance that the quantizers minimise."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from moequant.values import InputStats

Gating = Literal["none", "gate2"]
"""Whether a token counts once for its expert, or by the square of the router's weight g."""

PRIOR_TOKENS = 32.0
"""An expert that saw this many tokens trusts its own moments and the layer's equally."""

FLOOR = 1e-6
"""Smallest importance, relative to the expert's mean: a channel silent in calibration still counts."""


def importance(stats: InputStats, gating: Gating = "gate2", prior_tokens: float = PRIOR_TOKENS) -> Tensor:
    """Mean squared input of every column of every expert: f32 [E, in], finite and above 0.

    An expert's own mean is shrunk to the layer's pooled mean as if `prior_tokens` tokens
    of the average expert had been added; without any token it is the pooled mean.
    """
    if gating == "none":
        sums, mass = stats.moment, stats.tokens.double()
    else:
        sums, mass = stats.gated_moment, stats.gate_square
    total = mass.sum()
    if total == 0:
        return torch.ones_like(sums, dtype=torch.float32)
    pooled = sums.sum(0) / total
    # The prior is counted in tokens, so it is scaled to the average weight of one.
    prior = prior_tokens * total / stats.tokens.sum().clamp(min=1)
    mean = (sums + prior * pooled) / (mass + prior)[:, None]
    floor = mean.mean(1, keepdim=True) * FLOOR
    floor = torch.where(floor > 0, floor, torch.ones_like(floor))
    return torch.maximum(mean, floor).float()
