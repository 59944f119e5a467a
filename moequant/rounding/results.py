"""Rounded weights with what each expert lost: judged, decoded, joined of parts."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from moequant import formats
from moequant.formats import Format
from moequant.rounding.feedback import AT_ONCE, Rounded, outputs_lost
from moequant.values import ExpertLoss, Packed, Weight

Result = tuple[Packed, ExpertLoss]


def judged(
    weight: Weight,
    fmt: Format,
    target: Tensor,
    found: Rounded,
    hessians: Iterable[Tensor],
    tokens: Tensor | None = None,
) -> Result:
    """Experts target f32 [E, out, in] as they were rounded, and what each lost under its Hessian [in, in]."""
    each = list(zip(target, found.data, strict=True))
    both = [
        (outputs_lost(fmt, values, data, hessian), _energy(values, hessian))
        for (values, data), hessian in zip(each, hessians, strict=True)
    ]
    lost, energy = (torch.stack(part) for part in zip(*both, strict=True))
    loss = ExpertLoss(
        weight=weight.name,
        role=weight.role,
        layer=weight.layer,
        format=fmt.name,
        error=(lost / energy.clamp_min(torch.finfo(torch.float64).tiny)).nan_to_num(),
        tokens=tokens if weight.is_expert else None,
        fallbacks=tuple(bad.reason for bad in found.fallbacks),
    )
    return Packed(weight, fmt.name, found.data.cpu()), loss


def _energy(values: Tensor, hessian: Tensor) -> Tensor:
    """tr(W H Wᵀ) of one expert, f64 [] on the CPU."""
    parts = torch.split(values, max(1, AT_ONCE // values.shape[1]))
    return torch.stack([((part @ hessian) * part).sum().double().cpu() for part in parts]).sum()


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
