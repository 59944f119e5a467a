"""How weights are rounded under their Hessians, whichever weights they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from moequant import formats
from moequant.formats import Effort, Format
from moequant.rounding.feedback import Options, round_to_hessian
from moequant.rounding.paired import Grams
from moequant.rounding.results import Result, judged
from moequant.rounding.shrinkage import Trial
from moequant.rounding.target import Coupling
from moequant.statistics.fisher import Fishers
from moequant.values import Weight

UNROUNDED = ("F32", "F16", "BF16")

FISHER_TOKENS = 49_152
"""Tokens whose gradients are taken at effort best."""

Plain = Callable[[Weight, str], Result]
"""Packs a weight in a format without any Hessian."""


@dataclass(frozen=True, slots=True)
class Rounding:
    """How weights are rounded.

    `coupling` None keeps targets as they are; `trial` chooses how Hessians are shrunk; `gram_bytes` bounds
    what the experts that are rounded together take, which decides nothing else; `kept_bytes` what spares a
    second computation of attention (`recall`). The gradients of the first `fisher_tokens` say which outputs
    the loss feels (`fisher`); 0 does without.
    """

    coupling: Coupling | None = field(default_factory=Coupling)
    options: Options = field(default_factory=Options)
    trial: Trial = field(default_factory=Trial)
    gram_bytes: int = 1 << 30
    kept_bytes: int = 1 << 30
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
        """What values [E, out, in] are rounded towards, f32."""
        coupling = self.rounding.coupling
        values = values.to(grams.cross.device)
        return values.float() if coupling is None else coupling.target(values, grams)

    def round(
        self, weight: Weight, target: Tensor, hessian: Tensor, grams: Grams, experts: range | None = None
    ) -> Result:
        """A weight, or these experts of it: target f32 [E, out, in] under shrunk Hessians [E, in, in], judged
        under those of `grams`."""
        fmt, options = self.format(weight), replace(self.rounding.options, of=weight.numel)
        felt = None if self.fishers is None else self.fishers.outputs.get(weight.name)
        part = weight if experts is None else weight.of(experts)
        if felt is not None and experts is not None:
            felt = felt[experts.start : experts.stop]
        found = round_to_hessian(fmt, target, hessian, options, felt)
        own = (first + second for first, second in zip(*grams.halves, strict=True))
        return judged(part, fmt, target, found, own, grams.tokens)
