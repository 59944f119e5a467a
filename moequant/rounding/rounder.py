"""How weights are rounded under their Hessians, whichever weights they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from moequant import formats
from moequant.checkpoint import not_finite
from moequant.errors import CheckpointError, FormatError
from moequant.formats import Effort, Format, engine
from moequant.progress import advance
from moequant.rounding.feedback import ROWS_AT_ONCE, Options, Rounded, round_to_hessian, usable
from moequant.rounding.paired import Grams
from moequant.rounding.results import Result, judged, lost_by, stacked
from moequant.rounding.shrinkage import Trial
from moequant.rounding.target import Coupling
from moequant.statistics.fisher import Fishers
from moequant.values import Stack, Weight

UNROUNDED = ("F32", "F16", "BF16", "I32")

FISHER_TOKENS = 49_152
"""Tokens whose gradients are taken at effort best."""

Plain = Callable[[Weight, str], Result]
"""Packs a weight in a format without any Hessian."""


@dataclass(frozen=True, slots=True)
class Rounding:
    """How weights are rounded.

    `coupling` None keeps targets as they are; `trial` chooses how Hessians are shrunk; `gram_bytes` bounds
    what the experts that are rounded together take, which decides nothing else; `kept_bytes` what spares a
    second computation of attention (`recall`). Of one matrix `band` weights are rounded at a time, or 4,096
    rows: a head has more than a billion. The gradients of the first `fisher_tokens` say which outputs
    the loss feels (`fisher`); 0 does without.
    """

    coupling: Coupling | None = field(default_factory=Coupling)
    options: Options = field(default_factory=Options)
    trial: Trial = field(default_factory=Trial)
    gram_bytes: int = 1 << 30
    kept_bytes: int = 1 << 30
    band: int = 1 << 25
    fisher_tokens: int = 0

    @classmethod
    def of(cls, effort: Effort, coupled: bool = True) -> Rounding:
        """What an effort means; at `best` codes are searched for longer, under the Fisher as well."""
        options = Options(effort="best", rounds=6) if effort == "best" else Options(effort=effort)
        tokens = FISHER_TOKENS if effort == "best" else 0
        return cls(Coupling() if coupled else None, options, fisher_tokens=tokens)


@dataclass(frozen=True, slots=True)
class Rounder:
    """Rounds weights to their `formats`; `plain` packs those that no Hessian rounds."""

    formats: Mapping[str, str]
    plain: Plain
    rounding: Rounding
    fishers: Fishers | None = None

    def rounds(self, weight: Weight) -> bool:
        """Whether a weight is rounded under a Hessian."""
        name = self.formats.get(weight.name)
        kept = name is None or name in UNROUNDED or name == weight.origin.shipped
        return not kept and weight.site is not None

    def format(self, weight: Weight) -> Format:
        """The format of a weight that is packed."""
        return formats.get(self.formats[weight.name])

    def target(self, values: Tensor, grams: Grams) -> Tensor:
        """What values [E, out, in] are rounded towards, f32; `grams` are those of their rows."""
        coupling = self.rounding.coupling
        values = values.to(grams.cross.device)
        return values.float() if coupling is None else coupling.target(values, grams)

    def round(
        self,
        weights: Sequence[Weight],
        values: Callable[[Weight], Tensor],
        hessian: Tensor,
        grams: Grams,
        experts: range | None = None,
    ) -> list[Result]:
        """Weights that share their inputs, or these experts of them: each of `values` [E, out, in] towards
        its target under shrunk Hessians [E, in, in], judged under those of `grams`.

        CheckpointError names the tensor that holds what is no number, or more than the format can.
        """
        try:
            return self._round(weights, values, hessian, grams, experts)
        except FormatError as error:
            some = [each if experts is None else each.of(experts) for each in weights]
            broken = (not_finite(part, values(each)) for part, each in zip(some, weights, strict=True))
            told = next((found for found in broken if found), None)
            told = told or self._too_large(weights, values, grams, experts) or f"{weights[0].name}: {error}"
            raise CheckpointError(told) from error

    def _too_large(
        self,
        weights: Sequence[Weight],
        values: Callable[[Weight], Tensor],
        grams: Grams,
        experts: range | None,
    ) -> str | None:
        """The weight and expert whose target is the first that the format cannot hold; None where all fit."""
        for weight in weights:
            fmt, target = self.format(weight), self.target(values(weight), grams)
            beyond = (target.abs() > fmt.limit).flatten(1)
            if not bool(beyond.any()):
                continue
            first = int(beyond.any(1).nonzero()[0])
            found = target[first].flatten()[int(beyond[first].nonzero()[0])]
            at = f" of expert {first + (experts.start if experts else 0)}" if weight.is_expert else ""
            return (
                f"{weight.name}: {fmt.name} cannot hold {float(found):g}{at}, weights must be within "
                f"±{fmt.limit:g}; is the checkpoint damaged?"
            )
        return None

    def _round(
        self,
        weights: Sequence[Weight],
        values: Callable[[Weight], Tensor],
        hessian: Tensor,
        grams: Grams,
        experts: range | None,
    ) -> list[Result]:
        shared, found = self._shared(weights, values, grams), dict[str, Result]()
        for alike in self._alike(weights, grams):
            first = alike[0]
            fmt, options = self.format(first), replace(self.rounding.options, of=first.numel)
            felt = None if self.fishers is None else self.fishers.outputs.get(first.name)
            if felt is not None and experts is not None:
                felt = felt[experts.start : experts.stop]
            whole = [values(each) for each in alike]
            bands: list[list[tuple[Rounded, Tensor]]] = [[] for _ in alike]
            for rows in self._bands(first, len(alike), felt is not None):
                some = whole[0][:, rows] if len(alike) == 1 else torch.cat([w[:, rows] for w in whole], 1)
                wanted = self.target(some, grams.rows(rows))
                rounded = round_to_hessian(fmt, wanted, hessian, options, felt, shared.get(first.name))
                parts = zip(wanted.chunk(len(alike), 1), rounded.chunk(len(alike)), strict=True)
                for band, (target, part) in zip(bands, parts, strict=True):
                    own = (one + other for one, other in zip(*grams.halves, strict=True))
                    band.append((part, lost_by(fmt, target, part, own)))
            for each, band in zip(alike, bands, strict=True):
                weight = each if experts is None else each.of(experts)
                found[each.name] = judged(weight, fmt, *stacked(band), grams.tokens)
                advance(found[each.name][0].weight.numel)
        return [found[weight.name] for weight in weights]

    def _alike(self, weights: Sequence[Weight], grams: Grams) -> list[list[Weight]]:
        """Weights that are rounded as one: of one format and shape, when rows have nothing in common. What a
        Hessian costs, targets and factors, is paid once for them."""
        if self.fishers is not None or grams.pull is not None:
            return [[weight] for weight in weights]
        found: dict[object, list[Weight]] = {}
        for weight in weights:
            common = self.format(weight).shared is not None
            key = (self.formats[weight.name], weight.shape, weight.name if common else "")
            found.setdefault(key, []).append(weight)
        return list(found.values())

    def bundles(self, weights: Sequence[Weight], grams: Grams) -> list[list[Weight]]:
        """The same in parts, each of which is rounded as it would be with the others."""
        shared = [self.format(weight).shared for weight in weights]
        if any(each is not None and each.across for each in shared):
            return [list(weights)]
        return self._alike(weights, grams)

    def _shared(
        self, weights: Sequence[Weight], values: Callable[[Weight], Tensor], grams: Grams
    ) -> dict[str, Tensor]:
        """By weight, scales that it has in common with others of its group."""
        found: dict[str, Tensor] = {}
        for name in {self.formats[weight.name] for weight in weights}:
            fmt, members = formats.get(name), [w for w in weights if self.formats[w.name] == name]
            if fmt.shared is None or not fmt.shared.across or len(members) == 1:
                continue
            rows = torch.cat([self.target(values(weight), grams) for weight in members], 1)
            first, second = (half.diagonal(dim1=1, dim2=2).double() for half in grams.halves)
            d = engine.shared_scales(fmt, rows, usable(first + second), self.rounding.options.effort)
            parts = torch.split(d, [weight.shape[-2] for weight in members], 1)
            found |= {weight.name: part for weight, part in zip(members, parts, strict=True)}
        return found

    def _bands(self, weight: Weight, alike: int, whole: bool) -> Iterator[slice]:
        """Rows of each of so many weights that are rounded at a time: all, but of one large matrix whose rows
        have nothing in common."""
        rows = weight.shape[-2]
        if whole or weight.stack is not Stack.NONE or self.format(weight).shared is not None:
            yield slice(0, rows)
            return
        step = max(ROWS_AT_ONCE, self.rounding.band // (alike * weight.n_in))
        yield from (slice(at, min(at + step, rows)) for at in range(0, rows, step))
