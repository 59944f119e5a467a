"""Routed experts in both streams: the router is crossed once a layer, an expert multiplied once a stream.

What experts are fed does not depend on how they are rounded, so it is kept (`cross`). Then some experts at a
time are read, rounded and multiplied, and forgotten: gate and up under the Hessians of their inputs, down
under those of what the rounded gate and up make of them. What they give is added to both streams' sums in the
order of the experts, as the model does it. How many are taken at a time decides nothing: what a layer's
experts have in common, and how far their own Hessians are trusted, is known before the first is rounded.

Of several ranks each multiplies its batches by all experts, and rounds some of the experts that are taken at
a time. What experts are fed is sent to all, and so are the experts as they were rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from moequant.forward.experts import add_output, between, first_product, last_product
from moequant.forward.hidden import Hidden
from moequant.forward.model import changed_experts, of_experts, some_experts
from moequant.forward.stream import LayerStream
from moequant.rounding.paired import Grams, Seen
from moequant.rounding.parts import Parts
from moequant.rounding.results import Result, decoded, joined
from moequant.rounding.rounder import Rounder
from moequant.rounding.shrinkage import Layer, Mix, Shrinking, choose, classes, tried
from moequant.rounding.taken import Fed, Given, Mine, Pieces
from moequant.values import Weight

T = TypeVar("T")

FIXED = 2048
"""Tokens that take as long to sum up as an expert takes to round, whatever it saw."""

INNER = 8
"""What the second products of a chunk are fed stays in memory where so many times as much would find room."""


@dataclass(frozen=True, slots=True)
class Experts:
    """The routed experts of one layer.

    `module` is theirs, with everything but the matrices in memory; `weights` are the matrices, those that
    multiply the block's input first. What one chunk of experts makes lies under `folder` where memory is
    limited. `parts` keep each chunk that is rounded, where there are several.
    """

    rounder: Rounder
    stream: LayerStream
    module: nn.Module
    weights: tuple[Weight, ...]
    fed: Fed
    folder: Path
    parts: Parts | None = None

    def run(self, sums: tuple[Hidden, Hidden]) -> dict[str, Result]:
        """Every matrix that is rounded under Hessians; what experts give together [n, h] goes to `sums`."""
        first, last = (self._rounded(side) for side in ("experts", "inner"))
        parts: dict[str, list[Result]] = {weight.name: [] for weight in (*first, *last)}
        for batch in self.stream.mine:
            for each in sums:
                each.put(
                    self.fed.layer, batch, torch.zeros(len(self.fed.routes[batch][0].index), self.fed.width)
                )
        costs = (self.fed.counts(self.weights[0].matrices).sum(0) + FIXED).tolist()
        chunks = list(self._chunks())
        pieces = Pieces(self.parts if len(chunks) > 1 else None, self.stream.resources.ranks)
        inputs = self._inputs_shrunk(first[0]) if first and pieces.lack("experts", chunks) else None
        inner = self._inner_shrunk(last[0]) if last and pieces.lack("inner", chunks) else None
        for experts in chunks:
            mine = Mine.of(experts, self.stream.resources.ranks, costs)
            exact = rounded = self.read(experts)
            if first:
                found = pieces.found("experts", experts)
                if found is None:
                    grams = self.input_grams(first[0], mine.own)
                    found = pieces.kept("experts", experts, self._round(first, exact, mine, grams, inputs))
                    del grams
                rounded = self._packed(rounded, found, parts)
            given = Given(sums[0], self._waiting(experts))
            found = pieces.found("inner", experts) if last else []
            wanted = last[0] if found is None else None
            made = self.inner_grams(wanted, experts, (exact, rounded), given, mine.own)
            if made is not None:
                found = pieces.kept("inner", experts, self._round(last, exact, mine, made, inner))
            if found:
                rounded = self._packed(rounded, found, parts)
            del made
            self._add(given.inner, experts, rounded, sums[1])
        return {weight.name: joined(weight, parts[weight.name]) for weight in (*first, *last)}

    def input_grams(self, weight: Weight, experts: range) -> Grams:
        """Grams of what these experts' first products are fed."""

        def seen(batch: int) -> list[tuple[int, Seen]]:
            exact, rounded = self._inputs(batch)
            route = self.fed.routes[batch][1].to(experts)
            return [
                (expert, Seen(rounded[tokens], exact[tokens], gates.square()))
                for expert, (tokens, gates) in route.items()
            ]

        grams = Grams.empty(len(experts), weight, self.stream.resources.device)
        every = range(len(self.stream.batches)) if experts else ()
        for batch, found in enumerate(self.stream.each(_alone(seen), every)):
            for expert, each in found:
                grams.add(expert - experts.start, batch % 2, each)
        return grams

    def inner_grams(
        self,
        weight: Weight | None,
        experts: range,
        modules: tuple[nn.Module, nn.Module],
        given: Given | None = None,
        own: range | None = None,
    ) -> Grams | None:
        """Grams for `weight` of what second products of the rounded stream are fed, of its `own` experts.

        `modules` are the experts as they are and as they are rounded so far; `given` None: what they make is
        forgotten.
        """
        own = experts if own is None else own

        def work(batch: int) -> list[tuple[int, Seen]]:
            seen = self._inner(batch, experts, modules, given)
            return [] if weight is None else seen  # what nobody adds up is not sent

        grams = None if weight is None else Grams.empty(len(own), weight, self.stream.resources.device)
        for batch, found in enumerate(self.stream.shared(_alone(work))):
            for expert, each in found:
                if grams is not None and expert in own:
                    grams.add(expert - own.start, batch % 2, each)
        return grams

    def _inner(
        self, batch: int, experts: range, modules: tuple[nn.Module, nn.Module], given: Given | None = None
    ) -> list[tuple[int, Seen]]:
        """One batch: an expert multiplies in full precision what either stream sends it, once."""
        exact, rounded = modules
        inputs, routes = self._inputs(batch), [route.to(experts) for route in self.fed.routes[batch]]
        residual = None if self.fed.residual is None else self._get(self.fed.residual, batch)
        mass = self.fed.routes[batch][1].gates.sum(1, keepdim=True)
        total = None if given is None else self._get(given.exact, batch)
        seen, either = list[tuple[int, Seen]](), self._either(batch, experts)
        for expert in sorted(routes[0].keys() | routes[1].keys()):
            at = expert - experts.start
            sent, rows = [route[expert][0] for route in routes if expert in route], either[at]
            same = all(len(each) == len(rows) for each in sent)
            made = between(exact, first_product(exact, at, inputs[0][rows]))
            own = [made if same else made[torch.searchsorted(rows, tokens)] for tokens in sent]
            if expert in routes[0] and total is not None:
                tokens, gates = routes[0][expert]
                add_output(total, tokens, last_product(exact, at, own[0]), gates)
            if expert in routes[1]:
                tokens, gates = routes[1][expert]
                fed = between(rounded, first_product(rounded, at, inputs[1][tokens]))
                # Of a token's residual error each of its experts takes the share that its weight has.
                share = None if residual is None else residual[tokens] / mass[tokens]
                seen.append((expert, Seen(fed, own[-1], gates.square(), share)))
        if given is not None and total is not None:
            given.exact.put(self.fed.layer, batch, total)
            if seen:
                given.inner.put(self.fed.layer, batch, torch.cat([each.rounded for _, each in seen]))
        return seen

    def _either(self, batch: int, experts: range) -> list[Tensor]:
        """Tokens i64 [m] that either stream sends each of these experts, found for all of them at once: a GPU
        is not waited for an expert at a time."""
        routes = self.fed.routes[batch]
        shape = len(routes[0].index), self.weights[0].matrices + 1  # one more, for what is sent to nobody
        sent = torch.zeros(shape, dtype=torch.bool, device=routes[0].index.device)
        for route in routes:
            sent.scatter_(1, route.index, True)
        sent = sent[:, experts.start : experts.stop].T
        return list(torch.split(sent.nonzero()[:, 1], sent.sum(1).tolist()))

    def _waiting(self, experts: range) -> Hidden:
        """Room for what the second products of these experts are fed."""
        width = self._side("inner")[0].n_in
        sent = [route.to(experts).values() for _, route in self.fed.routes]
        shapes = [(sum(len(tokens) for tokens, _ in each), width) for each in sent]
        return self.stream.room(self.folder, shapes, INNER)

    def _add(self, inner: Hidden, experts: range, rounded: nn.Module, into: Hidden) -> None:
        """Add what these experts give, rounded, to the sum of their stream."""

        def add(batch: int) -> None:
            route = self.fed.routes[batch][1].to(experts)
            if not route:
                return
            total, values = self._get(into, batch), self._get(inner, batch)
            parts = torch.split(values, [len(tokens) for tokens, _ in route.values()])
            for (expert, (tokens, gates)), fed in zip(route.items(), parts, strict=True):
                add_output(total, tokens, last_product(rounded, expert - experts.start, fed), gates)
            into.put(self.fed.layer, batch, total)

        for _ in self.stream.each(_alone(add)):
            pass
        inner.drop(self.fed.layer)

    def _round(
        self,
        weights: Sequence[Weight],
        exact: nn.Module,
        mine: Mine,
        grams: Grams,
        shrinking: Shrinking | None,
    ) -> list[Result]:
        """These experts of weights that share their inputs, each rounded by one rank."""
        assert shrinking is not None
        found = list[Result]()
        if mine.own:
            hessian, at = shrinking.of(grams.halves, mine.own), mine.slice
            found = self.rounder.round(
                weights, lambda each: of_experts(exact, each)[at], hessian, grams, mine.own
            )
        every = [each for each in self.stream.resources.ranks.all(found) if each]
        return [
            joined(weight.of(mine.experts), [each[at] for each in every]) for at, weight in enumerate(weights)
        ]

    def _inputs_shrunk(self, weight: Weight) -> Shrinking:
        """How far the Hessians of the block's inputs are trusted."""
        half, whole = self._common(weight.n_in)
        counts, trial = self.fed.counts(weight.matrices), self.rounder.rounding.trial
        every = classes(counts.sum(0), (counts > 0).all(0), weight.n_in, trial)
        wanted = [expert for each in every for expert in each.tried]

        def work(mine: list[int]) -> list[dict[Mix, float]]:
            ones = [range(expert, expert + 1) for expert in mine]
            return [
                self._tried(weight, self.read(one, (weight,)), self.input_grams(weight, one), half)
                for one in ones
            ]

        errors = self.stream.resources.ranks.dealt(wanted, [1] * len(wanted), work)
        return Shrinking(whole, choose(every, dict(zip(wanted, errors, strict=True))))

    def _inner_shrunk(self, weight: Weight) -> Shrinking:
        """The same of what second products are fed, tried with gate and up as they are.

        Columns of different experts are different neurons: they have a scale in common, and nothing else.
        """
        counts, trial = self.fed.counts(weight.matrices), self.rounder.rounding.trial
        every = classes(counts.sum(0), (counts > 0).all(0), weight.n_in, trial)
        wanted = [range(expert, expert + 1) for each in every for expert in each.tried]
        layer, ranks = Layer(None, self._scale(wanted)), self.stream.resources.ranks
        errors = dict[int, dict[Mix, float]]()
        for at in range(0, len(wanted), ranks.count):  # one for each rank, all of which sum it up together
            found = dict[int, dict[Mix, float]]()
            for rank, one in enumerate(wanted[at : at + ranks.count]):
                exact = self.read(one)
                own = one if rank == ranks.rank else range(0)
                grams = self.inner_grams(weight, one, (exact, exact), own=own)
                if own and grams is not None:
                    mine = (exact, grams)
            if at + ranks.rank < len(wanted):
                found[wanted[at + ranks.rank].start] = self._tried(weight, *mine, layer)
            for each in ranks.all(found):
                errors |= each
        return Shrinking(layer, choose(every, errors))

    def _tried(self, weight: Weight, exact: nn.Module, grams: Grams, layer: Layer) -> dict[Mix, float]:
        trial, halves = self.rounder.rounding.trial, (grams.halves[0][0], grams.halves[1][0])
        rows = trial.sampled(weight.shape[-2])
        target = self.rounder.target(of_experts(exact, weight)[:, rows], grams.rows(rows))
        return tried(self.rounder.format(weight), target[0], halves, layer, trial)

    def _common(self, width: int) -> tuple[Layer, Layer]:
        """What the inputs of all experts have in common: of even batches, and of all."""
        device = self.stream.resources.device

        def half(number: int) -> Tensor:
            total = torch.zeros(width, width, device=device)
            for batch in range(number, len(self.fed.routes), 2):
                route, fed = self.fed.routes[batch][1], self._get(self.fed.rounded, batch)
                fed = torch.where(fed.isfinite().all(1, keepdim=True), fed, 0.0)
                total.addmm_((fed * route.gates.square().sum(1, keepdim=True)).T, fed)
            return total

        ranks = self.stream.resources.ranks
        both = ranks.dealt((0, 1), (1, 1), lambda mine: [half(number) for number in mine])
        halves = torch.stack([each.to(device) for each in both])
        sent = [int((route.index < self.weights[0].matrices).sum()) for _, route in self.fed.routes]
        tokens = torch.tensor([sum(sent[::2]), sum(sent[1::2])])
        return Layer.of(halves[:1], tokens[:1]), Layer.of(halves, tokens)

    def _scale(self, wanted: list[range]) -> Tensor:
        """The mean square of what second products are fed, f64 []: of these experts."""
        total, count = torch.zeros((), dtype=torch.float64), 0
        for one in wanted:
            exact = self.read(one, self._side("experts"))

            def work(batch: int, one: range = one, exact: nn.Module = exact) -> list[tuple[Tensor, int]]:
                found = list[tuple[Tensor, int]]()
                for _, each in self._inner(batch, one, (exact, exact)):
                    assert each.weight is not None
                    sum_ = (each.rounded.square().sum(1) * each.weight).sum().double().cpu()
                    found.append((sum_, each.rounded.numel()))
                return found

            for found in self.stream.shared(_alone(work)):
                for sum_, numbers in found:
                    total += sum_
                    count += numbers
        return total / max(count, 1)

    def _side(self, side: str) -> tuple[Weight, ...]:
        """The matrices that are fed there: the block's "experts" input, or "inner"."""
        return tuple(
            weight for weight in self.weights if weight.site is not None and weight.site.side == side
        )

    def _rounded(self, side: str) -> tuple[Weight, ...]:
        """Those that are rounded under Hessians."""
        return tuple(weight for weight in self._side(side) if self.rounder.rounds(weight))

    def _chunks(self) -> Iterator[range]:
        """Experts that are taken at a time: as many as `gram_bytes` has room for."""
        each = 0
        for weight in self.weights:
            rows, columns = weight.shape[-2:]
            each = max(each, columns * (5 * columns + rows))
        each += 3 * sum(weight.numel // weight.matrices for weight in self.weights)
        step = max(1, self.rounder.rounding.gram_bytes // (4 * each)) * self.stream.resources.ranks.count
        total = self.weights[0].matrices
        yield from (range(at, min(at + step, total)) for at in range(0, total, step))

    def read(self, experts: range, weights: tuple[Weight, ...] | None = None) -> nn.Module:
        """The module with these experts' values, in f32: every batch multiplies with them; of `weights` alone
        where given."""
        stream = self.stream

        def values(weight: Weight) -> Tensor:
            return stream.provider(weight).float()

        return some_experts(self.module, weights or self.weights, experts, values, stream.resources.device)

    def _packed(self, module: nn.Module, found: list[Result], parts: dict[str, list[Result]]) -> nn.Module:
        """The module with these experts as they were packed; they are put to the other `parts`."""
        for packed, loss in found:
            parts[loss.weight].append((packed, loss))
        by_name = {packed.weight.name: packed for packed, _ in found}
        weights = [packed.weight for packed, _ in found]
        return changed_experts(module, weights, lambda weight: decoded(by_name[weight.name]))

    def _inputs(self, batch: int) -> tuple[Tensor, Tensor]:
        return self._get(self.fed.exact, batch), self._get(self.fed.rounded, batch)

    def _get(self, hidden: Hidden, batch: int) -> Tensor:
        return hidden.get(self.fed.layer, batch).to(self.stream.resources.device)


def _alone(work: Callable[[int], T]) -> Callable[[int], T]:
    """The same without gradients, in threads as well."""

    def alone(batch: int) -> T:
        with torch.inference_mode():
            return work(batch)

    return alone
