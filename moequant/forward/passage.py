"""Batches on their way across one layer whose experts are in memory some at a time.

Every batch crosses the layer up to its experts, and what those are fed and who is sent where is kept. Then
some experts after the other multiply what all batches send them, in the order in which the whole layer adds
them up. At last every batch crosses the layer again, which is told what its experts gave. What recorders are
told, and every number, is what the whole layer gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from moequant.forward.experts import Rounding, Route, add_experts
from moequant.forward.hidden import Hidden
from moequant.forward.taps import Enough, Recorder, recording

if TYPE_CHECKING:
    from moequant.forward.stream import LayerStream

R = TypeVar("R", bound=Recorder)


class _Counting(Recorder):
    """Tells `to` all but the first `skipped` of what flows; what it says of itself is said of `to`."""

    def __init__(self, to: Recorder, skipped: int = 0) -> None:
        self.to, self.skipped, self.seen = to, skipped, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.to, name)

    def dense(self, name: str, inputs: Tensor) -> None:
        """See `Recorder`."""
        if (to := self._counted()) is not None:
            to.dense(name, inputs)

    def heads(self, name: str, inputs: Tensor) -> None:
        """See `Recorder`."""
        if (to := self._counted()) is not None:
            to.heads(name, inputs)

    def routed(self, name: str, hidden: Tensor, index: Tensor, gates: Tensor) -> None:
        """See `Recorder`."""
        if (to := self._counted()) is not None:
            to.routed(name, hidden, index, gates)

    def _counted(self) -> Recorder | None:
        """Who is told of what flows now."""
        self.seen += 1
        return self.to if self.seen > self.skipped else None


class _UpTo(_Counting):
    """Stops in front of the experts: `kept` is what they are fed [n, h], and where the router sends it."""

    kept: tuple[Tensor, Route]

    def routed(self, name: str, hidden: Tensor, index: Tensor, gates: Tensor) -> None:
        """See `Recorder`."""
        super().routed(name, hidden, index, gates)
        fed = self.to.fed(name, hidden) if isinstance(self.to, Rounding) else hidden
        self.kept = fed, Route(index, gates)
        raise Enough


class _Behind(_Counting):
    """Goes on where `_UpTo` stopped: the experts `gave` [n, h]."""

    def __init__(self, to: Recorder, skipped: int, gave: Tensor) -> None:
        super().__init__(to, skipped)
        self._gave = gave

    def given(self, hidden: Tensor) -> Tensor:
        """See `forward.experts.Known`."""
        return self._gave.to(hidden, copy=True)  # models add shared experts to it in place


@dataclass(frozen=True, slots=True)
class Way:
    """Hidden states of one version: what it feeds the layer, and where that goes which it feeds the next
    (None: nowhere); room for what experts are fed and give, where they come some at a time."""

    hidden: Hidden
    into: Hidden | None
    rooms: tuple[Hidden, Hidden] | None


class Passage(Generic[R]):
    """Batches of one or more ways that have the layer's weights in common, each with its own recorder.

    A task is a batch of a way: all of the first, then all of the next, but those of this rank alone. The
    recorders are `make(task)`, in `told` once they stand in front of the experts, and come back in the order
    of tasks.
    """

    def __init__(
        self, stream: LayerStream, layer: int, ways: Sequence[Way], make: Callable[[int], R]
    ) -> None:
        self._stream, self._layer, self._ways, self._make = stream, layer, ways, make
        self.told: list[R] = []
        self._waiting: list[tuple[Route, int]] = []
        every = len(stream.batches)
        self._tasks = [way * every + batch for way in range(len(ways)) for batch in stream.mine]

    def through(self) -> Iterator[R]:
        """All tasks cross the layer, whose weights are all there."""

        def work(task: int) -> R:
            told = self._make(task)
            self._run(task, told)
            return told

        return self._each(work)

    def reach(self) -> None:
        """All tasks cross the layer up to its experts."""

        def work(task: int) -> tuple[R, Route, int]:
            way, batch = self._way(task)
            told = self._make(task)
            up_to = _UpTo(told)
            self._stream.run(self._layer, batch, way.hidden, up_to)
            fed, route = up_to.kept
            for room, values in zip(way.rooms or (), (fed, torch.zeros(fed.shape)), strict=True):
                room.put(self._layer, batch, values)
            return told, route, up_to.seen

        for told, route, seen in self._each(work):
            self.told.append(told)
            self._waiting.append((route, seen))

    def multiply(self, module: nn.Module, experts: range) -> None:
        """Let these experts, those of `module`, do their part; all of the layer's have their turn once."""

        def work(number: int) -> None:
            way, batch = self._way(self._tasks[number])
            sent = self._waiting[number][0].to(experts)
            if way.rooms is None or not sent:
                return
            device = self._stream.resources.device
            fed, total = (room.get(self._layer, batch).to(device) for room in way.rooms)
            with recording(self.told[number]):
                add_experts(total, module, fed, sent, experts.start)
            way.rooms[1].put(self._layer, batch, total)

        for _ in self._each(work, range(len(self._tasks))):
            pass

    def leave(self) -> Iterator[R]:
        """All tasks are behind the layer, once its experts have had their turn."""

        def work(number: int) -> R:
            task, told = self._tasks[number], self.told[number]
            way, batch = self._way(task)
            if way.rooms is not None:
                gave = way.rooms[1].get(self._layer, batch)
                self._run(task, _Behind(told, self._waiting[number][1], gave))
            return told

        yield from self._each(work, range(len(self._tasks)))
        for way in self._ways:
            for room in way.rooms or ():
                room.drop(self._layer)

    def _run(self, task: int, told: Recorder | None) -> None:
        """The task through the layer, and to where it goes."""
        way, batch = self._way(task)
        out = self._stream.run(self._layer, batch, way.hidden, told)
        if way.into is not None and out is not None:
            way.into.put(self._layer + 1, batch, out)

    def _way(self, task: int) -> tuple[Way, int]:
        """Whose batch the task is, and which."""
        number, batch = divmod(task, len(self._stream.batches))
        return self._ways[number], batch

    def _each(self, work: Callable[[int], Any], numbers: Sequence[int] | None = None) -> Iterator[Any]:
        """See `LayerStream.each`, over all tasks, or over numbers of them."""

        def alone(task: int) -> Any:
            with torch.inference_mode():
                return work(task)

        return self._stream.each(alone, self._tasks if numbers is None else numbers)
