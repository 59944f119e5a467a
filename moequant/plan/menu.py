"""What a plan may choose from: the types of llama.cpp, or (`plan.folders`) the schemes of vLLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from moequant.containers.gguf.presets import UNQUANTIZED
from moequant.plan.allocate import Unit
from moequant.plan.choose import NO_PINS, groups, make_units
from moequant.plan.sensitivity import Sensitivities, as_stored, candidates, prior_sensitivities
from moequant.values import Weight

CHECKS = (2.5, 5.25)
"""Bits per weight of two whole plans that say how sensitivities add up, a coarse one and a fine one."""


class Menu(Protocol):
    """The formats that weights may have, and what must have the same one."""

    def candidates(self, weight: Weight) -> tuple[str, ...]:
        """Names of formats, as plans have them; a single one is no choice."""

    def measured(self, weight: Weight) -> tuple[str, ...]:
        """Every format whose error is measured: candidates, and what else somebody asks for; of a weight that
        has its format already that one, or none where it costs nothing."""

    def exact(self, weight: Weight) -> str | None:
        """The candidate that has the very numbers of the checkpoint, None when none does."""

    def block_format(self, name: str, weight: Weight) -> str:
        """What `formats.get` calls a candidate."""

    def input_error(self, name: str) -> float:
        """Squared error over square that the runtime's rounding of inputs adds to a candidate's."""

    def groups(self, weights: tuple[Weight, ...]) -> list[tuple[Weight, ...]]:
        """Weights that must have the same format."""

    def units(self, weights: tuple[Weight, ...], sensitivities: Sensitivities) -> list[Unit]:
        """The same with their formats, bytes and costs."""

    def checks(self, weights: tuple[Weight, ...], units: Sequence[Unit]) -> tuple[int, ...]:
        """Bytes of two whole plans, a coarse one and a fine one."""

    def prior(self, weights: tuple[Weight, ...], layers: int) -> Sensitivities:
        """Sensitivities where nothing was measured."""


@dataclass(frozen=True)
class GgufMenu:
    """llama.cpp's types; `pins` are those that a person gave to weights. If these are `settled`, nobody asks
    what such a weight would cost in another type."""

    pins: Mapping[str, str] = field(default_factory=dict)
    settled: bool = False

    def candidates(self, weight: Weight) -> tuple[str, ...]:
        """See `Menu`."""
        return candidates(weight)

    def measured(self, weight: Weight) -> tuple[str, ...]:
        """See `Menu`."""
        names, pin = candidates(weight), self.pins.get(weight.name)
        if self.settled and pin is not None:
            return () if pin in UNQUANTIZED else (pin,)
        return names if pin is None or pin in (*names, *UNQUANTIZED) else (*names, pin)

    def exact(self, weight: Weight) -> str | None:
        """See `Menu`."""
        return as_stored(weight)

    def block_format(self, name: str, weight: Weight) -> str:
        """See `Menu`."""
        return name

    def input_error(self, name: str) -> float:
        """See `Menu`: the same for all types of a product, and fixed by the file's kind."""
        return 0.0

    def groups(self, weights: tuple[Weight, ...]) -> list[tuple[Weight, ...]]:
        """See `Menu`."""
        return groups(weights)

    def units(self, weights: tuple[Weight, ...], sensitivities: Sensitivities) -> list[Unit]:
        """See `Menu`."""
        return make_units(weights, sensitivities, pins=self.pins if self.settled else NO_PINS)

    def checks(self, weights: tuple[Weight, ...], units: Sequence[Unit]) -> tuple[int, ...]:
        """See `Menu`."""
        numel = sum(weight.numel for weight in weights)
        return tuple(round(bits * numel / 8) for bits in CHECKS)

    def prior(self, weights: tuple[Weight, ...], layers: int) -> Sensitivities:
        """See `Menu`."""
        return prior_sensitivities(weights, layers)


GGUF = GgufMenu()
