"""What every format would cost every weight, in KL divergence, measured on this model.

What a format costs in a weight is its relative error, from a sample of rows and experts,
times the loss's sensitivity to that weight, from a probe: the weight alone is given an error
in the whole model and the KL divergence to the unchanged one is scored. Probes of two
whole plans, the best for those sensitivities, then say how sensitivities add up. `benchmarks/cases/plan.py`
holds predictions against measurements.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import sqrt

import torch
from torch import Tensor

from moequant import formats
from moequant.checkpoint import Checkpoint, load
from moequant.formats import Effort
from moequant.forward.resources import FREE, Resources
from moequant.plan import Sensitivities, Unit, allocate
from moequant.plan.distortion import distorted
from moequant.plan.figures import FILE_BYTES, Figures
from moequant.plan.menu import GGUF, Menu
from moequant.plan.probes import Version, divergences
from moequant.progress import counted
from moequant.statistics.importance import Gating, importance
from moequant.values import Calibration, InputStats, Role, Weight

PROBED = 0.06
"""The relative squared error of a probed weight, about that of Q2_K: so much that the KL divergence is
that of the error itself, and not of the few tokens that a tiny error already sends to other experts."""


@dataclass(frozen=True, slots=True)
class Probing:
    """What is measured, every format of the `menu`, and how much is spent on it.

    `tokens` are shared by all probes, each scoring whole rows, at least one and at most
    `rows`; `sample` weights of every matrix are packed in every format, from at most
    `experts` experts.
    """

    tokens: int = 131_072
    rows: int = 16
    sample: int = 1 << 15
    experts: int = 16
    effort: Effort = "default"
    gating: Gating = "gate2"
    menu: Menu = GGUF

    def groups(self, weights: Iterable[Weight]) -> list[tuple[Weight, ...]]:
        """Of the weights, those that are probed together: that run, and may have one format or another."""
        running = tuple(weight for weight in weights if weight.runs)
        return [g for g in self.menu.groups(running) if len(self.menu.candidates(g[0])) > 1]

    def scored(self, groups: int, ids: Tensor) -> int:
        """How many rows of ids i64 [rows, n] each of the probes of so many groups scores."""
        wanted = self.tokens // (max(1, groups) * ids.shape[1])
        return max(1, min(wanted, self.rows, len(ids)))

    def sampled(self, weight: Weight) -> tuple[int, int]:
        """How many experts of a weight are sampled, and how many rows of each."""
        experts = min(weight.matrices, self.experts)
        return experts, max(1, min(weight.shape[-2], self.sample // (experts * weight.n_in)))

    def kept_bytes(self, checkpoint: Checkpoint, ids: Tensor) -> int:
        """What `Figures` of it take at most: hidden states of the model and of all probes in front of two
        layers, and what is found of every weight and probe."""
        groups, shape = len(self.groups(checkpoint.weights)), checkpoint.shape
        tokens = self.scored(groups, ids) * ids.shape[1]
        states = 4 * (1 + groups) * tokens * shape.hidden * shape.streams
        return 2 * states + FILE_BYTES * (len(checkpoint.weights) + groups)


UNFELT = frozenset({Role.INDEXER})
"""Roles of weights that do nothing in rows as short as those of probes: an indexer chooses among thousands of
tokens. What an error costs there is taken from tables where probes feel less."""


def measure(
    checkpoint: Checkpoint,
    calibration: Calibration,
    ids: Tensor | None,
    probing: Probing = Probing(),  # frozen
    resources: Resources = FREE,
    figures: Figures | None = None,
) -> Sensitivities:
    """Sensitivities of all formats of the menu for all weights.

    `ids` i64 [rows, n] is text for the probes, better not the text of `calibration`; with
    None only relative errors are measured, and sensitivities come from tables. Samples and probes are dealt
    to ranks. What is finished is kept in `figures`, and a run that was killed goes on after it, with the same
    result. Raises CheckpointError for a weight that cannot be read.
    """
    return resources.ranks.together(_measured, checkpoint, calibration, ids, probing, resources, figures)


def _measured(
    checkpoint: Checkpoint,
    calibration: Calibration,
    ids: Tensor | None,
    probing: Probing,
    resources: Resources,
    figures: Figures | None,
) -> Sensitivities:
    """The same, by every rank."""
    errors = _errors(checkpoint.weights, calibration, probing, resources, figures)
    if ids is None:
        found = probing.menu.prior(checkpoint.weights, checkpoint.n_layers)
        table = {
            name: {fmt: error * found.per_error[name] for fmt, error in row.items()}
            for name, row in errors.items()
        }
        return replace(found, table=table, source="relative errors measured, sensitivities from tables")
    return _Prober(checkpoint, calibration, errors, ids, probing, resources, figures).sensitivities()


def _errors(
    weights: Sequence[Weight],
    calibration: Calibration,
    probing: Probing,
    resources: Resources,
    figures: Figures | None,
) -> dict[str, dict[str, float]]:
    """By the names of weights, their `sample_errors`."""
    every, ranks = range(len(weights)), resources.ranks
    known = {} if figures is None else ranks.told(lambda: figures.every("errors", every))

    def sampled(mine: Sequence[int]) -> list[dict[str, float]]:
        found = list[dict[str, float]]()
        for number in counted("errors", mine, "tensor"):
            weight = weights[number]
            found.append(sample_errors(weight, _stats(weight, calibration), probing, resources.device))
            if figures is not None and any(found[-1].values()):  # others are found at once
                figures.keep(found[-1], "errors", number)
        return found

    left = [number for number in every if number not in known]
    costs = [
        min(weights[number].numel, probing.sample) * len(probing.menu.measured(weights[number]))
        for number in left
    ]
    known |= zip(left, ranks.dealt(left, costs, sampled), strict=True)
    return {weight.name: known[number] for number, weight in enumerate(weights)}


def sample_errors(
    weight: Weight,
    stats: InputStats | None,
    probing: Probing,
    device: str = "cpu",
) -> dict[str, float]:
    """Format -> relative squared error that it makes in the output of `weight`, over all of its experts: of
    every one that the menu wants measured, with what the menu adds for rounded inputs.

    Errors of columns count by the mean square of what they multiply, errors of experts by
    the sum of the squared router weights of their tokens. Experts are sampled evenly in
    order of that mass, each standing for its neighbours; rows are sampled evenly.
    """
    menu, names = probing.menu, probing.menu.measured(weight)
    if len(menu.candidates(weight)) == 1 or not weight.runs:
        return dict.fromkeys(names, 0.0)
    count = weight.matrices
    experts, rows = probing.sampled(weight)
    chosen, mass = _sample_experts(stats if count > 1 else None, count, experts)
    at = torch.linspace(0, weight.shape[-2] - 1, rows).round().long()
    sample = _sampled(weight, chosen, at).to(device)
    columns = None if stats is None else importance(stats, probing.gating)[chosen].to(device)
    share = torch.ones_like(sample[:, 0]) if columns is None else columns
    share = share.double() * mass[:, None].to(device)
    total = (sample.double().square().sum(1) * share).sum()
    errors = {}
    for name in names:
        if name == menu.exact(weight):
            errors[name] = 0.0
            continue
        fmt = formats.get(menu.block_format(name, weight))
        decoded = formats.dequantize(fmt, formats.quantize(fmt, sample, columns, probing.effort))
        error = ((sample - decoded).double().square().sum(1) * share).sum()
        errors[name] = float(error / total.clamp(min=torch.finfo(torch.float64).tiny)) + menu.input_error(
            name
        )
    return errors


def _sampled(weight: Weight, chosen: Tensor, rows: Tensor) -> Tensor:
    """These rows of these matrices, f32 [s, rows, in]; of experts, no others are read."""
    if weight.is_table:
        return load(weight.at(tuple(torch.unique(rows).tolist())))[None].float()
    if not weight.is_expert:
        values = load(weight)
        return (values if values.ndim == 3 else values[None])[chosen][:, rows].float()
    parts = (load(weight.of(range(expert, expert + 1))) for expert in chosen.tolist())
    return torch.cat([part[:, rows] for part in parts]).float()


def _sample_experts(stats: InputStats | None, experts: int, limit: int) -> tuple[Tensor, Tensor]:
    """Indices i64 [s] of at most `limit` experts, spread over the order of their mass, and the mass f64 [s]
    of the experts that each stands for."""
    mass = torch.ones(experts, dtype=torch.float64) if stats is None else stats.gate_square.double()
    if not mass.sum():
        mass = torch.ones_like(mass)
    strata = torch.argsort(mass, stable=True).tensor_split(min(experts, limit))
    chosen = torch.stack([stratum[len(stratum) // 2] for stratum in strata])
    return chosen, torch.stack([mass[stratum].sum() for stratum in strata])


def _stats(weight: Weight, calibration: Calibration) -> InputStats | None:
    return None if weight.site is None else calibration.inputs[weight.site.name]


@dataclass(frozen=True)
class _Prober:
    """Versions of the model whose weights are off as formats would make them by `errors`, weight -> format ->
    relative error, and their KL divergences to it, on some of the rows `ids`. What is finished is kept in
    `figures`."""

    checkpoint: Checkpoint
    calibration: Calibration
    errors: Mapping[str, Mapping[str, float]]
    ids: Tensor
    probing: Probing
    resources: Resources
    figures: Figures | None

    @cached_property
    def groups(self) -> list[tuple[Weight, ...]]:
        """Weights that are probed together."""
        return self.probing.groups(self.checkpoint.weights)

    @cached_property
    def scored(self) -> Tensor:
        """The rows of tokens that are scored."""
        count = self.probing.scored(len(self.groups), self.ids)
        return self.ids[torch.linspace(0, len(self.ids) - 1, count).round().long()]

    def sensitivities(self) -> Sensitivities:
        """Sensitivities of every group, then how the sensitivities of whole plans add up."""
        menu, weights, per_error = self.probing.menu, self.checkpoint.weights, dict.fromkeys(self.errors, 0.0)
        asked = [group for group in self.groups if any(self.errors[weight.name] for weight in group)]
        versions = [dict.fromkeys((weight.name for weight in group), PROBED) for group in asked]
        for probed, kl in zip(versions, self._divergences("probes", versions), strict=True):
            per_error.update(dict.fromkeys(probed, max(kl, 0.0) / sum(probed.values())))
        prior = menu.prior(weights, self.checkpoint.n_layers).per_error
        unfelt = {weight.name for weight in weights if weight.role in UNFELT}
        per_error |= {name: max(per_error[name], prior[name]) for name in unfelt}
        table = {
            name: {fmt: error * per_error[name] for fmt, error in row.items()}
            for name, row in self.errors.items()
        }
        found = Sensitivities(table, per_error, "")
        units = menu.units(weights, found)
        plans = [self._plan(units, size) for size in menu.checks(weights, units)]
        felt = [{name: fmt for name, fmt in types.items() if name not in unfelt} for types in plans]
        sums = [sum(table[name].get(fmt, 0.0) for name, fmt in types.items()) for types in felt]
        off = [{name: self.errors[name].get(fmt, 0.0) for name, fmt in types.items()} for types in plans]
        linear, root = fit(zip(sums, self._divergences("plans", off), strict=True))
        tokens = self.scored.shape[0] * (self.scored.shape[1] // 2 - 1)
        source = f"{len(asked)} probes of {tokens:,} tokens each"
        return replace(found, source=source, linear=linear, root=root)

    def _plan(self, units: list[Unit], limit: int) -> dict[str, str]:
        """The types of the best plan of so many bytes."""
        smallest = sum(min(option.bytes for option in unit.options) for unit in units)
        types = {}
        for unit, option in zip(units, allocate(units, max(smallest, limit)), strict=True):
            types.update(dict.fromkeys((weight.name for weight in unit.weights), option.format))
        return types

    def _divergences(self, name: str, versions: Sequence[Version]) -> list[float]:
        """Of versions whose weights have these errors. They are kept under that name."""
        off = [{name: error for name, error in each.items() if error} for each in versions]
        figures = None if self.figures is None else self.figures.within(name)
        return divergences(self.checkpoint, self.scored, off, self._distorted, self.resources, figures)

    def _distorted(self, weight: Weight, error: float) -> Tensor:
        """The weight, or some of its experts, with an error."""
        values, stats = load(weight), _stats(weight, self.calibration)
        columns = None if stats is None else importance(stats, self.probing.gating)
        if columns is not None:
            columns = columns[weight.experts] if weight.is_expert else columns
            columns = columns[0] if values.ndim == 2 else columns
        return distorted(values.to(self.resources.device), error, columns)


def fit(checks: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """(linear, root) >= 0 such that linear * x + root * sqrt(x) meets both checks (x, KL divergence).

    The square root is what tiny errors do: the number of tokens that they send to other
    experts grows as the error, not as its square. Where two non-negative numbers cannot
    meet both checks, the line alone goes between them.
    """
    (x1, y1), (x2, y2) = checks
    if min(x1, x2, y1, y2) <= 0:
        return 1.0, 0.0
    bend = x1 * sqrt(x2) - x2 * sqrt(x1)
    if bend:
        linear, root = (y1 * sqrt(x2) - y2 * sqrt(x1)) / bend, (x1 * y2 - x2 * y1) / bend
        if linear >= 0 and root >= 0:
            return linear, root
    return sqrt(y1 / x1 * y2 / x2), 0.0
