"""Experts of a layer that are rounded some at a time: what they are fed, whose they are, what is finished."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moequant.forward.experts import Route
from moequant.forward.hidden import Hidden
from moequant.ranks import Ranks
from moequant.rounding.parts import Parts
from moequant.rounding.results import Result


@dataclass(frozen=True, slots=True)
class Fed:
    """What the experts of a layer are fed, batch by batch: [n, width] in both streams; both routes; and in
    `residual` the error [n, h] that the residual stream carries, where it is used."""

    layer: int
    width: int
    exact: Hidden
    rounded: Hidden
    residual: Hidden | None
    routes: Sequence[tuple[Route, Route]]

    def counts(self, experts: int) -> Tensor:
        """Tokens of every expert of the rounded stream, in even and odd batches: i64 [2, E]."""
        found = torch.zeros(2, experts, dtype=torch.int64)
        for batch, (_, route) in enumerate(self.routes):
            found[batch % 2] += torch.bincount(route.index.reshape(-1), minlength=experts)[:experts].cpu()
        return found

    def drop(self) -> None:
        """Forget the inputs."""
        for each in (self.exact, self.rounded, self.residual):
            if each is not None:
                each.drop(self.layer)


@dataclass(frozen=True, slots=True)
class Mine:
    """Experts that are taken at a time, and this rank's `own` among them."""

    experts: range
    own: range

    @classmethod
    def of(cls, experts: range, ranks: Ranks, costs: Sequence[float]) -> Mine:
        """Neighbours, so that what they cost is much the same on every rank."""
        part = ranks.part([costs[expert] for expert in experts])
        return cls(experts, range(experts.start + part.start, experts.start + part.stop))

    @property
    def slice(self) -> slice:
        """Where its own are."""
        return slice(self.own.start - self.experts.start, self.own.stop - self.experts.start)


@dataclass(frozen=True, slots=True)
class Pieces:
    """Chunks of a layer's experts that `parts` keep, None: nothing is kept. Every rank gets the same."""

    parts: Parts | None
    ranks: Ranks

    def lack(self, side: str, chunks: Sequence[range]) -> bool:
        """Whether any of the chunks is still to be rounded."""
        parts = self.parts
        if parts is None:
            return True
        return self.ranks.told(lambda: not all(parts.has_piece(side, each) for each in chunks))

    def found(self, side: str, experts: range) -> list[Result] | None:
        """What was rounded before the process was killed, None: nothing. OutputError where it is damaged."""
        parts = self.parts
        if parts is None:
            return None
        return self.ranks.told(lambda: parts.piece(side, experts) if parts.has_piece(side, experts) else None)

    def kept(self, side: str, experts: range, results: list[Result]) -> list[Result]:
        """The same, which are found from now on."""
        if self.parts is not None:
            self.parts.add_piece(side, experts, results)
        return results


@dataclass(frozen=True, slots=True)
class Given:
    """Where the experts of one chunk leave what they make: what the exact ones give is added to `exact`, the
    sum [n, h] of their stream; what the second products of the rounded stream are fed waits in `inner`,
    [m, f] a batch, expert by expert, until those are rounded."""

    exact: Hidden
    inner: Hidden
