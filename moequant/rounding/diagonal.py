"""Weights into packed bytes, one tensor at a time, with what each expert lost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor

from moequant import formats
from moequant.checkpoint import Checkpoint, load, load_packed, not_finite
from moequant.errors import CheckpointError, FormatError
from moequant.files import room
from moequant.formats import Effort, engine
from moequant.progress import Bar
from moequant.statistics.importance import Gating, importance
from moequant.values import Calibration, ExpertLoss, InputStats, Packed, Role, Weight

TINY = torch.finfo(torch.float64).tiny

BAND = 1 << 26
"""Weights of a table that are packed at a time."""

ROWS_AT_ONCE = 1 << 22
"""Weights decoded at a time when errors are summed: bounds working memory."""


@dataclass(frozen=True, slots=True)
class Quantizer:
    """How weights are rounded: what calibration saw, how hard to search, how tokens are weighted, and the
    device that searches."""

    calibration: Calibration | None
    effort: Effort = "default"
    gating: Gating = "gate2"
    device: str = "cpu"

    def stats(self, weight: Weight) -> InputStats | None:
        """What calibration saw of the inputs of `weight`."""
        if self.calibration is None or weight.site is None:
            return None
        return self.calibration.inputs[weight.site.name]

    def pack(
        self, weight: Weight, format_name: str, together: Sequence[Weight] = ()
    ) -> tuple[Packed, ExpertLoss]:
        """Load, quantize and measure one weight; one that is stored in that very format is taken over as it
        is. `together` are the weights, with this one, that have one scale of their matrices in some formats.

        CheckpointError names a weight that is not finite.
        """
        if weight.is_table and weight.origin.rows is None:
            return self._in_bands(weight, format_name)
        stats = self.stats(weight)
        seen = stats.tokens if stats is not None and weight.is_expert else None
        if format_name == weight.origin.shipped and (exact := load_packed(weight)) is not None:
            lost = torch.zeros(weight.matrices, dtype=torch.float64)
            return Packed(weight, format_name, exact), ExpertLoss(
                weight.name, weight.role, weight.layer, format_name, lost, seen
            )
        values = load(weight)
        if weight.role is Role.TABLE:  # whole numbers: nothing is rounded
            return Packed(weight, format_name, values.view(torch.uint8)), ExpertLoss(
                weight.name, weight.role, weight.layer, format_name, torch.zeros(1, dtype=torch.float64), None
            )
        columns = importance(stats, self.gating) if stats is not None else None
        if columns is not None and values.ndim == 2:
            columns = columns[0]
        matrix = values if values.ndim > 1 else values[None]
        fmt = formats.get(format_name)
        try:
            shared = self._shared(fmt, weight, columns, together) if len(together) > 1 else None
            data = formats.quantize(fmt, matrix, columns, self.effort, shared=shared, device=self.device)
        except FormatError as error:
            raise CheckpointError(not_finite(weight, values) or f"{weight.name}: {error}") from error
        loss = ExpertLoss(
            weight.name,
            weight.role,
            weight.layer,
            format_name,
            relative_error(fmt, matrix, data, columns, self.device),
            seen,
        )
        return Packed(weight, format_name, data), loss

    def _in_bands(self, weight: Weight, format_name: str) -> tuple[Packed, ExpertLoss]:
        """A table, some of its rows at a time; what is made of a large one lies in a file, not in memory."""
        fmt, done, sums = formats.get(format_name), 0, torch.zeros(2, 1, dtype=torch.float64)
        data = torch.from_numpy(room((weight.shape[0], fmt.row_bytes(weight.n_in)), weight.name))
        for band in weight.bands(BAND):
            into = data[done : done + band.shape[0]]
            done += band.shape[0]
            if format_name == weight.origin.shipped and (exact := load_packed(band)) is not None:
                into.copy_(exact)
                continue
            values = load(band)
            try:
                into.copy_(formats.quantize(fmt, values, None, self.effort, device=self.device))
            except FormatError as error:
                raise CheckpointError(not_finite(band, values) or f"{weight.name}: {error}") from error
            sums += squares(fmt, values, into, None, self.device)
        return Packed(weight, format_name, data), ExpertLoss(
            weight.name, weight.role, weight.layer, format_name, sums[0] / sums[1].clamp(min=TINY), None
        )

    def _shared(
        self, fmt: formats.Format, weight: Weight, columns: Tensor | None, together: Sequence[Weight]
    ) -> Tensor | None:
        """The scales that the rows of this weight have in common with others, where its format has such."""
        if fmt.shared is None or not fmt.shared.across:
            return None
        rows = torch.cat([load(each) for each in together], -2)
        stack = rows.reshape(-1, *rows.shape[-2:])
        flat = None if columns is None else columns.reshape(len(stack), -1)
        found = engine.shared_scales(fmt, stack, flat, self.effort)
        parts = torch.split(found, [each.shape[-2] for each in together], 1)
        return parts[[each.name for each in together].index(weight.name)]


def relative_error(
    fmt: formats.Format, values: Tensor, data: Tensor, columns: Tensor | None, device: str = "cpu"
) -> Tensor:
    """Importance-weighted squared error over weighted square of each expert: f64 [E], of `squares`."""
    error, total = squares(fmt, values, data, columns, device).unbind()
    return torch.div(error, total.clamp(min=TINY))


def squares(
    fmt: formats.Format, values: Tensor, data: Tensor, columns: Tensor | None, device: str = "cpu"
) -> Tensor:
    """Importance-weighted squared error and weighted square of each expert, summed on that device.

    values [E, out, in] or [out, in], data u8 [..., out, row_bytes], columns [E, in] or
    [in] or None -> f64 [2, E] on the CPU.
    """
    stack = values.reshape(-1, *values.shape[-2:])
    packed = data.reshape(*stack.shape[:2], -1)
    weights = torch.ones(len(stack), stack.shape[-1]) if columns is None else columns.reshape(len(stack), -1)
    weights, step = weights.to(device), max(1, ROWS_AT_ONCE // stack.shape[-1])
    error, total = torch.zeros((2, len(stack)), dtype=torch.float64, device=device).unbind()
    some = max(1, step // max(1, stack.shape[1]))
    for at in range(0, len(stack), some):
        for first in range(0, stack.shape[1], step):
            rows = slice(first, first + step)
            decoded = formats.dequantize(fmt, packed[at : at + some, rows].to(device))
            for expert, made in enumerate(decoded, at):
                exact = stack[expert, rows].to(device).float()
                error[expert] += ((exact - made).square().sum(0).double() * weights[expert]).sum()
                total[expert] += (exact.square().sum(0).double() * weights[expert]).sum()
    return torch.stack([error, total]).cpu()


def pack_all(
    checkpoint: Checkpoint,
    formats: Mapping[str, str],
    quantizer: Quantizer,
    finished: Set[str] = frozenset(),
) -> Iterator[tuple[Packed, ExpertLoss]]:
    """Every weight of `formats` that is not `finished`, in the checkpoint's order, packed when asked for."""
    wanted = [weight for weight in checkpoint.weights if weight.name in formats]
    together: dict[tuple[str, str], list[Weight]] = {}
    for weight in wanted:
        if weight.site is not None:
            together.setdefault((weight.site.name, formats[weight.name]), []).append(weight)
    for weight in wanted:
        name = formats[weight.name]
        key = ("" if weight.site is None else weight.site.name, name)
        if weight.name not in finished:
            yield quantizer.pack(weight, name, together.get(key, ()))


def progress(
    every: Iterator[tuple[Packed, ExpertLoss]], weights: Iterable[Weight], given: Set[str] = frozenset()
) -> Iterator[tuple[Packed, ExpertLoss]]:
    """The same `weights`, and a bar that counts them; those that are `given` take hardly any time."""
    with Bar("quantize", sum(weight.numel for weight in weights), "w") as bar:
        came = 0
        for packed, loss in every:
            yield packed, loss
            came += packed.weight.numel
            if packed.weight.name in given:
                bar.give(packed.weight.numel)
            else:
                bar.at(came)
