"""What errors in weights do to what a model says: changed versions of it cross the layers side by side.

A version is the model with some weights changed. It is the unchanged model up to the first of them, and
starts there from the unchanged hidden states. Layers are in memory one at a time, or some of their experts,
so a model of any size is probed, and memory decides nothing but where hidden states lie.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from moequant.checkpoint import Checkpoint
from moequant.evaluate import log_softmax
from moequant.files import scratch
from moequant.forward.hidden import Hidden
from moequant.forward.memory import Versions
from moequant.forward.model import Provider, changed, changed_experts, using
from moequant.forward.passage import Passage
from moequant.forward.resources import FREE, Resources
from moequant.forward.stream import LayerStream
from moequant.forward.taps import Recorder
from moequant.plan.figures import Crossing, Figures
from moequant.plan.vocabulary import Said
from moequant.progress import Bar
from moequant.values import Role, Weight

Version = Mapping[str, float]
"""The relative squared errors that weights of a version have; weights that are not named have none."""

Distorted = Callable[[Weight, float], Tensor]
"""A weight, or some of its experts, with that error."""

KL = "kl"
"""What divergences are called among figures."""


def divergences(
    checkpoint: Checkpoint,
    ids: Tensor,
    versions: Sequence[Version],
    distorted: Distorted,
    resources: Resources = FREE,
    figures: Figures | None = None,
) -> list[float]:
    """The mean KL divergence of every version to the model, over rows of tokens ids i64 [rows, n].

    Versions are dealt to ranks, each of which lets the model itself cross the layers with its own. What is
    finished is kept in `figures`, and a run that was killed goes on after it.
    """
    every, ranks = range(len(versions)), resources.ranks
    known = {} if figures is None else ranks.told(lambda: figures.every(KL, every))

    def work(mine: Sequence[int]) -> list[float]:
        if mine:
            named = {number: versions[number] for number in mine}
            return _divergences(checkpoint, ids, named, distorted, resources, figures)
        if figures is not None:  # the others wait at every layer
            for _ in range(figures.reached, checkpoint.n_layers):
                ranks.wait()
        return []

    if left := [number for number in every if number not in known]:
        costs = [_cost(checkpoint, versions[number]) for number in left]
        known |= zip(left, ranks.dealt(left, costs, work), strict=True)
    if figures is not None and ranks.first:
        figures.forget_states()
    return [known[number] for number in every]


def _cost(checkpoint: Checkpoint, version: Version) -> int:
    """Layers that a version crosses: from that of its first changed weight on, and the head."""
    behind, firsts = checkpoint.n_layers, list[int]()
    for weight in checkpoint.weights:
        if weight.name in version:
            outside = 0 if weight.role is Role.EMBEDDING else behind
            firsts.append(outside if weight.layer is None else weight.layer)
    return behind - min(firsts, default=behind) + 1


def _divergences(
    checkpoint: Checkpoint,
    ids: Tensor,
    versions: Mapping[int, Version],
    distorted: Distorted,
    resources: Resources,
    figures: Figures | None,
) -> list[float]:
    """Those of this rank's versions, by number."""
    one_row = replace(resources.apart, batch_tokens=ids.shape[1])
    among = Versions(weights=2, states=len(versions) + 1)
    with scratch() as folder, LayerStream(checkpoint, ids, one_row, whole=True, among=among) as stream:
        scored = ids.shape[1] - ids.shape[1] // 2 - 1
        states = {number: stream.new_hidden(folder / str(number)) for number in versions}
        probes = _Probes(stream, versions, distorted, stream.new_hidden(folder / "model"), states, scored)
        if figures is not None:
            probes = probes.lasting(Crossing.of(figures, stream.shapes, versions, resources.ranks))
        return probes.run()


@dataclass(frozen=True, slots=True)
class _Crossing:
    """A version of which weights of a layer change, on its way across that. Where experts come some at a
    time: the `values` of the parameters that are there, and the `experts` that change."""

    number: int
    passage: Passage[Recorder]
    values: Mapping[str, Tensor]
    experts: tuple[Weight, ...]


@dataclass(frozen=True, slots=True)
class _Probes:
    """Versions on their way through the layers: hidden states of the model, and `states` of each version.
    What they say is asked at so many positions of every row, `scored`: the last, but for the very last. With
    a `crossing` the states are its, and lie in front of the layer that it has reached."""

    stream: LayerStream
    versions: Mapping[int, Version]
    distorted: Distorted
    model: Hidden
    states: Mapping[int, Hidden]
    scored: int
    crossing: Crossing | None = None
    first: int = 0

    def lasting(self, crossing: Crossing) -> _Probes:
        """The same with states that outlive the process, from where an earlier one stopped. OutputError when
        what that left is damaged."""
        shapes, first = self.stream.shapes, crossing.reached
        model = crossing.lasting(self.model, shapes, None)
        states = {number: crossing.lasting(each, shapes, number) for number, each in self.states.items()}
        crossing.disk.drop(first - 1)  # it may have died before it did
        for each in (model, *(states[number] for number in self._started(first))) if first else ():
            each.resume(first, range(len(shapes)))
        return replace(self, model=model, states=states, crossing=crossing, first=first)

    def run(self) -> list[float]:
        """The divergence of each version."""
        stream, started = self.stream, self._started(self.first)
        if not self.first:
            stream.embed(self.model)
            for number in started:
                stream.embed(self.states[number], self._provider(number))
        # A layer costs what crosses it: the model, and versions from the first layer on that they change.
        costs = [1 + len(self._started(layer + 1)) for layer in range(stream.n_layers)]
        with Bar("probe", sum(costs), "crossing", done=sum(costs[: self.first])) as bar:
            for layer in stream.layers(self.first):
                self._cross(layer, started)
                if self.crossing is not None:
                    self.crossing.finish(layer + 1)
                bar.update(costs[layer])
        return self._divergences(started)

    def _started(self, layer: int) -> set[int]:
        """Versions that are no longer the model itself in front of that layer."""
        behind = {each.name for each in self.stream.checkpoint.weights if _is_before(each, layer)}
        return {number for number, version in self.versions.items() if not behind.isdisjoint(version)}

    def _cross(self, layer: int, started: set[int]) -> None:
        """All versions across one layer, the model last: versions start from what that is fed."""
        stream, crossing = self.stream, list[_Crossing]()
        unchanged = [self.states[number] for number in started if not self._named(number, layer)]
        for number, states in self.states.items():
            if named := self._named(number, layer):
                before = states if number in started else self.model
                crossing.append(self._enter(layer, number, named, (before, states)))
                started.add(number)
        together = stream.enter(layer, [(each, each) for each in (*unchanged, self.model)], _nobody)
        for experts in stream.chunks(layer):
            module = stream.part(layer, experts)
            for each in crossing:
                each.passage.multiply(self._changed(module, each, experts), experts)
            together.multiply(module, experts)
        for each in crossing:
            with using(stream.model, each.values):
                deque(each.passage.leave(), 0)
        deque(together.leave(), 0)
        for hidden in (self.model, *(self.states[number] for number in started)):
            hidden.drop(layer)

    def _enter(self, layer: int, number: int, named: list[Weight], way: tuple[Hidden, Hidden]) -> _Crossing:
        """A version in which weights of the layer change, at or behind the layer."""
        stream, apart = self.stream, bool(self.stream.chunks(layer))
        there = [each for each in named if not (apart and each.is_expert)]
        values = changed(stream.model, there, self._provider(number))
        with using(stream.model, values):
            passage = stream.enter(layer, [way], _nobody)
        experts = tuple(each for each in named if each not in there)
        return _Crossing(number, passage, values if apart else {}, experts)

    def _changed(self, module: nn.Module, crossing: _Crossing, experts: range) -> nn.Module:
        """These experts, those of `module`, as the version has them."""
        parts = [each.of(experts) for each in crossing.experts]
        return changed_experts(module, parts, self._provider(crossing.number))

    def _divergences(self, started: set[int]) -> list[float]:
        """What the ends of the versions say, held against what the model says."""
        stream, found = self.stream, list[float]()
        with stream.ends():
            said = [self._said(row) for row in range(len(stream.batches))]
            for number, states in self.states.items():
                named = self._named(number, None, *self._at_the_end)
                with using(stream.model, changed(stream.model, named, self._provider(number))):
                    stream.tie()
                    given = states if number in started else self.model
                    kl = [each.divergence(self._logits(row, given, each)) for row, each in enumerate(said)]
                found.append(float(torch.cat(kl).mean()))
                if self.crossing is not None:
                    self.crossing.figures.keep(found[-1], KL, number)
        return found

    def _said(self, row: int) -> Said:
        """What the model says at the scored positions of a row."""
        return Said.of(log_softmax("baseline", self._logits(row, self.model)))

    def _logits(self, row: int, states: Hidden, said: Said | None = None) -> Tensor:
        """Logits at the scored positions of a row, [m, vocab]; or [m, s], of tokens that were drawn."""
        with nullcontext() if said is None else self.stream.only(said.tokens):
            logits: Tensor = self.stream.end(row, states, logits_to_keep=self.scored + 1).logits[0]
        return logits[:-1].cpu()

    @property
    def _at_the_end(self) -> tuple[Role, ...]:
        return (Role.OUTPUT, Role.EMBEDDING) if self.stream.checkpoint.tied else (Role.OUTPUT,)

    def _named(self, number: int, layer: int | None, *roles: Role) -> list[Weight]:
        """The weights of a layer, or those of the roles outside, that a version changes."""
        named = [each for each in self.stream.weights(layer) if each.name in self.versions[number]]
        return [each for each in named if not roles or each.role in roles]

    def _provider(self, number: int) -> Provider:
        """The weights that a version changes."""
        return lambda weight: self.distorted(weight, self.versions[number][weight.name])


def _is_before(weight: Weight, layer: int) -> bool:
    """Whether what is in front of that layer was multiplied with the weight."""
    return weight.role is Role.EMBEDDING if weight.layer is None else weight.layer < layer


def _nobody(task: int) -> Recorder:
    """Of what flows nothing is kept."""
    return Recorder()
