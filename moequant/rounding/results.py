"""Rounded weights with what each expert lost: judged, decoded, joined of parts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from moequant import formats
from moequant.formats import Format
from moequant.rounding.feedback import Rounded, energy, outputs_lost
from moequant.values import ExpertLoss, Packed, Weight

Result = tuple[Packed, ExpertLoss]

JUDGED = 256
"""Of more rows than these every fourth is judged: each costs two products with the Hessian."""


def lost_by(fmt: Format, target: Tensor, found: Rounded, hessians: Iterable[Tensor]) -> Tensor:
    """What each of the experts target f32 [E, out, in] lost under its Hessian [in, in], and what there was to
    lose: f64 [2, E] on the CPU; of more than JUDGED rows as every fourth of them tells."""
    rows = slice(None) if target.shape[1] <= JUDGED else slice(None, None, 4)
    both = [
        torch.stack([outputs_lost(fmt, values, data, hessian), energy(values, hessian)])
        for values, data, hessian in zip(target[:, rows], found.data[:, rows], hessians, strict=True)
    ]
    return torch.stack(both, 1).cpu() * (target.shape[1] / target[0, rows].shape[0])


def stacked(bands: Sequence[tuple[Rounded, Tensor]]) -> tuple[Rounded, Tensor]:
    """Bands of rows of the same experts, and what those lost f64 [2, E], as one."""
    if len(bands) == 1:
        return bands[0]
    each = [rounded for rounded, _ in bands]
    fallbacks = {bad for one in each for bad in one.fallbacks}
    return Rounded(
        torch.cat([one.data for one in each], 1),
        each[0].damping,
        tuple(sorted(fallbacks, key=lambda bad: bad.expert)),
    ), torch.stack([lost for _, lost in bands]).sum(0)


def judged(weight: Weight, fmt: Format, found: Rounded, both: Tensor, tokens: Tensor | None = None) -> Result:
    """Experts as they were rounded, and what each lost of what there was (`lost_by`)."""
    lost, whole = both
    loss = ExpertLoss(
        weight=weight.name,
        role=weight.role,
        layer=weight.layer,
        format=fmt.name,
        error=(lost / whole.clamp_min(torch.finfo(torch.float64).tiny)).nan_to_num(),
        tokens=tokens if weight.is_expert else None,
        fallbacks=tuple(bad.reason for bad in found.fallbacks),
    )
    return Packed(weight, fmt.name, found.data.cpu()), loss


def decoded(packed: Packed) -> Tensor:
    """The values that a runtime will see, f32, shape of the weight."""
    return formats.dequantize(formats.get(packed.format), packed.data).reshape(packed.weight.shape)


def joined(weight: Weight, parts: list[Result]) -> Result:
    """One weight of parts that hold some experts each."""
    data = torch.cat([packed.data for packed, _ in parts]).reshape(*weight.shape[:-1], -1)
    losses = [loss for _, loss in parts]
    tokens = [loss.tokens for loss in losses if loss.tokens is not None]
    return Packed(weight, parts[0][0].format, data), ExpertLoss(
        weight=weight.name,
        role=weight.role,
        layer=weight.layer,
        format=losses[0].format,
        error=torch.cat([loss.error for loss in losses]),
        tokens=torch.cat(tokens) if tokens else None,
        fallbacks=tuple(reason for loss in losses for reason in loss.fallbacks),
    )
