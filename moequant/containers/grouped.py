"""Weights into integer codes and scales, one tensor at a time, with what each expert lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from torch import Tensor
from tqdm import tqdm

from moequant.checkpoint import Checkpoint, load, not_finite
from moequant.errors import CheckpointError, FormatError
from moequant.formats import groups
from moequant.formats.groups import GroupFormat
from moequant.quantize import Quantizer
from moequant.routing.statistics import importance
from moequant.values import ExpertLoss, Plan, Weight

Rounding = Callable[[GroupFormat, Weight, Tensor, Tensor], Tensor]
"""(format, weight, values [E, out, in], scales [E, out, groups]) -> codes i8 [E, out, in]."""


@dataclass(frozen=True, slots=True)
class Grouped:
    """A weight as integers: `codes` i8 [E, out, in], `scales` [E, out, groups], rows as the checkpoint's."""

    weight: Weight
    format: GroupFormat
    codes: Tensor
    scales: Tensor


def nearest(fmt: GroupFormat, weight: Weight, values: Tensor, scales: Tensor) -> Tensor:
    """Every weight to the nearest code: the rounding that needs no statistics."""
    return groups.round_codes(fmt, values, scales)


def pack_all(
    checkpoint: Checkpoint,
    plan: Plan,
    fmt: GroupFormat,
    quantizer: Quantizer,
    losses: list[ExpertLoss],
    rounding: Rounding = nearest,
) -> Iterator[Grouped]:
    """The plan's integer weights in its order, made when asked for; losses are appended as they are known.

    CheckpointError names a weight that is not finite.
    """
    by_name = {weight.name: weight for weight in checkpoint.weights}
    chosen = [by_name[choice.weight] for choice in plan.choices if choice.format == fmt.name]
    total = sum(weight.numel for weight in chosen)
    with tqdm(total=total, unit="w", unit_scale=True, desc="quantize", disable=None, leave=False) as bar:
        for weight in chosen:
            yield _appending(losses, *quantize(weight, fmt, quantizer, rounding))  # and not kept here
            bar.update(weight.numel)


def _appending(losses: list[ExpertLoss], grouped: Grouped, loss: ExpertLoss) -> Grouped:
    losses.append(loss)
    return grouped


def quantize(
    weight: Weight, fmt: GroupFormat, quantizer: Quantizer, rounding: Rounding = nearest
) -> tuple[Grouped, ExpertLoss]:
    """Load, scale, round and measure one weight."""
    stored = replace(weight, rope_heads=0)  # rows stay as transformers has them
    values = load(stored)
    values = values.reshape(-1, *values.shape[-2:])
    stats = quantizer.stats(weight)
    columns = importance(stats, quantizer.gating) if stats is not None else None
    try:
        scales = groups.search(fmt, values, columns, quantizer.effort)
    except FormatError as error:
        raise CheckpointError(not_finite(weight, values) or f"{weight.name}: {error}") from error
    codes = rounding(fmt, weight, values, scales)
    loss = ExpertLoss(
        weight.name,
        weight.role,
        weight.layer,
        fmt.name,
        groups.relative_error(fmt, values, codes, scales, columns),
        stats.tokens if stats is not None and weight.role.is_expert else None,
    )
    return Grouped(weight, fmt, codes, scales), loss
