"""Grams of two streams that cross the same layer: full precision and quantized so far.

For weights that multiply the same activations x, summed over tokens with the weight s
that their expert's output has (the router's weight squared; 1 when dense):

    own    Σ s · x_q x_qᵀ     what the quantized layer will really see
    cross  Σ s · x_fp x_qᵀ    the same tokens in full precision, routed as the quantized stream routes them
    pull   Σ s · r x_qᵀ       r: the error that the residual stream carries so far
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moequant.forward.taps import Enough, Recorder
from moequant.ranks import ALONE, Ranks
from moequant.values import Weight


@dataclass(frozen=True, slots=True)
class Seen:
    """Tokens of one expert in one batch: inputs f32 [m, in], s [m] or None, r [m, out] or None."""

    rounded: Tensor
    exact: Tensor
    weight: Tensor | None = None
    residual: Tensor | None = None

    def on(self, device: torch.device) -> Seen:
        """The same on that device."""
        weight, residual = (
            None if each is None else each.to(device) for each in (self.weight, self.residual)
        )
        return Seen(self.rounded.to(device), self.exact.to(device), weight, residual)


@dataclass(frozen=True, slots=True)
class Grams:
    """Sums for E weights: `halves` two f32 [E, in, in] whose sum is own (even and odd batches), `cross`
    f32 [E, in, in], `pull` f32 [E, out, in] or None, `tokens` i64 [E]."""

    halves: tuple[Tensor, Tensor]
    cross: Tensor
    pull: Tensor | None
    tokens: Tensor

    @classmethod
    def empty(cls, experts: int, weight: Weight, device: str) -> Grams:
        """Zero sums for so many experts of `weight`."""

        def zeros(rows: int) -> Tensor:
            return torch.zeros(experts, rows, weight.n_in, device=device)

        pull = zeros(weight.shape[-2]) if weight.adds else None
        halves = zeros(weight.n_in), zeros(weight.n_in)
        return cls(halves, zeros(weight.n_in), pull, torch.zeros(experts, dtype=torch.int64))

    @property
    def own(self) -> Tensor:
        """Both halves together, a new tensor."""
        return self.halves[0] + self.halves[1]

    def of(self, experts: slice) -> Grams:
        """Those of some experts, without a copy."""
        pull = None if self.pull is None else self.pull[experts]
        halves = self.halves[0][experts], self.halves[1][experts]
        return Grams(halves, self.cross[experts], pull, self.tokens[experts])

    def rows(self, rows: slice | Tensor) -> Grams:
        """Those of some rows [n] of the weights: only `pull` tells rows apart."""
        return self if self.pull is None else replace(self, pull=self.pull[:, rows])

    def add(self, expert: int, half: int, seen: Seen, ranks: Ranks = ALONE) -> None:
        """Add tokens of one expert to that half. Of several ranks each adds to its own of the sums, and they
        are `exchanged` at last."""
        mine, seen = ranks.mine(4), seen.on(self.cross.device)
        weighted = seen.rounded if seen.weight is None else seen.rounded * seen.weight[:, None]
        if 2 + half in mine:
            self.halves[half][expert].addmm_(weighted.T, seen.rounded)
        if 0 in mine:
            self.cross[expert].addmm_(seen.exact.T, weighted)
        if 1 in mine and self.pull is not None and seen.residual is not None:
            self.pull[expert].addmm_(seen.residual.T, weighted)
        self.tokens[expert] += len(weighted)

    def exchanged(self, ranks: Ranks) -> Grams:
        """All sums, of which every rank has made its own."""
        own = [self.cross, self.pull, *self.halves]
        every = ranks.in_turn(iter([own[number] for number in ranks.mine(4)]), 4)
        cross, pull, even, odd = (None if each is None else each.to(self.cross.device) for each in every)
        assert cross is not None and even is not None and odd is not None
        return Grams((even, odd), cross, pull, self.tokens)


class Capture(Recorder):
    """A recorder that keeps what a weight, or the experts of a layer, are fed and the residual stream before
    it, then stops the layer.

    `wanted` is the name of the site. `middle` names the norm between attention and feed-forward block, whose
    input is the residual stream that the block adds to.
    """

    def __init__(self, wanted: str, middle: str) -> None:
        self.wanted, self.middle = wanted, middle
        self.inputs: Tensor | None = None
        self.residual: Tensor | None = None
        self.index: Tensor | None = None
        self.gates: Tensor | None = None

    def dense(self, name: str, inputs: Tensor) -> None:
        """See `Recorder`."""
        if name == self.middle:
            self.residual = inputs.flatten(0, -2)
        if name == self.wanted:
            self.inputs = inputs.flatten(0, -2)
            raise Enough

    def heads(self, name: str, inputs: Tensor) -> None:
        """See `Recorder`."""
        if name == self.wanted:
            self.inputs = inputs.flatten(0, -3)
            raise Enough

    def routed(self, name: str, hidden: Tensor, index: Tensor, gates: Tensor) -> None:
        """See `Recorder`."""
        if name == self.wanted:
            self.inputs, self.index, self.gates = hidden, index, gates
            raise Enough


@dataclass(frozen=True, slots=True)
class Pair:
    """One batch in both streams, and the error r [n, h] that the residual stream carries (None: not used)."""

    exact: Capture
    rounded: Capture
    residual: Tensor | None

    def seen(self) -> Iterator[tuple[int, Seen]]:
        """What a weight, or each matrix of a stack of heads, is fed."""
        exact, rounded = self.exact.inputs, self.rounded.inputs
        assert exact is not None and rounded is not None
        if rounded.ndim == 2:
            yield 0, Seen(rounded, exact, residual=self.residual)
            return
        for head in range(rounded.shape[1]):
            yield head, Seen(rounded[:, head], exact[:, head])
