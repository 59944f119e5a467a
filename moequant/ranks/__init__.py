"""Several processes that do one command together, as torchrun starts them: all that knows of them.

The first runs the command as if it were alone. Where there is much to do it tells the others a function and
its arguments (`Ranks.together`), which all of them run, each doing its share of it. Between such stages the
others wait (`Ranks.serve`): they print, lock and write nothing. One process is the ordinary case of it.

What is dealt decides nothing: results come back to every rank, in the order of what was dealt, and sums are
made in that order.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any, TypeVar, cast

from moequant.errors import RankError

if TYPE_CHECKING:
    from moequant.ranks.wire import Wire

R = TypeVar("R")
T = TypeVar("T")

TORCHRUN = "TORCHELASTIC_RUN_ID"
"""What torchrun alone sets, for every process that it starts."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """One of `count` processes; `wire` is None where it is alone.

    All calls but those of the first rank to `together` are made by every rank, in the same order. Sent to
    another process, it becomes that one's own.
    """

    rank: int = 0
    count: int = 1
    local: int = 0
    wire: Wire | None = None

    def __reduce__(self) -> tuple[Callable[[], Ranks], tuple[()]]:
        return here, ()

    @property
    def first(self) -> bool:
        """Whether this process prints, locks and writes."""
        return self.rank == 0

    def device(self, asked: str) -> str:
        """Where this process computes: of several, each on the GPU of its own number on its machine."""
        return f"cuda:{self.local}" if self.count > 1 and asked.startswith("cuda") else asked

    def together(self, stage: Callable[..., T], *given: Any) -> T:
        """`stage(*given)` by all ranks; called by the first. Raises what the stage raises on any of them.

        What comes one by one is read to its end, or the run is over.
        """
        self._from(0, lambda: (stage, given))
        found = stage(*given)
        if self.wire is not None and isinstance(found, Iterator):
            return cast(T, self.wire.read(found))
        return found

    def serve(self) -> None:
        """What every rank but the first does: its share of every stage, until there is none left."""
        while (told := self._from(0)) is not None:
            stage, given = told
            found = stage(*given)
            if isinstance(found, Iterator):
                deque(found, 0)  # the first gets them too

    def leave(self) -> None:
        """There are no more stages: the first says so, and nobody goes before all know."""
        if self.first:
            self._from(0, lambda: None)
        if self.wire is not None:
            self.wire.part()

    def end(self, error: BaseException) -> bool:
        """A rank that serves ends with that error, which the first says. Whether this one is to say it,
        because the first is dead."""
        return self.wire is not None and self.wire.end(error)

    def told(self, work: Callable[[], T]) -> T:
        """`work()`, done by the first rank for all."""
        found: T = self._from(0, work)
        return found

    def all(self, value: T) -> list[T]:
        """The value of every rank, in their order."""
        return [self._from(rank, lambda: value) for rank in range(self.count)]

    def wait(self) -> None:
        """Until every rank is here."""
        self.all(None)

    def mine(self, count: int) -> range:
        """Which of so many equal things are this rank's: every so-manieth."""
        return range(self.rank, count, self.count)

    def in_turn(self, mine: Iterator[T], count: int) -> Iterator[T]:
        """What all ranks make of so many things, in order; this one's are `mine`."""
        for first in range(0, count, self.count):
            own = next(mine, None)  # all are at work before they wait for each other
            for source in range(min(self.count, count - first)):
                yield self._from(source, lambda own=own: own)  # type: ignore[misc]
        deque(mine, 0)  # what it does behind the last

    def dealt(
        self, items: Sequence[R], costs: Sequence[float], work: Callable[[list[R]], Sequence[T]]
    ) -> list[T]:
        """`work` gives a result for each of some items, of none too. Every item is done by one rank, so that
        the costs of the ranks are much the same; all get every result, in the order of the items."""
        shares = deal(costs, self.count)
        found = self.all(list(work([items[at] for at in shares[self.rank]])))
        by_item = dict(zip(chain.from_iterable(shares), chain.from_iterable(found), strict=True))
        return [by_item[at] for at in range(len(items))]

    def part(self, costs: Sequence[float]) -> range:
        """Which of the things with these costs, in a row, are this rank's: neighbours."""
        ends = [0, *accumulate(costs)]
        steps = [ends[-1] * rank / self.count for rank in range(self.count + 1)]
        cuts = [min(range(len(ends)), key=lambda at, step=step: abs(ends[at] - step)) for step in steps]  # type: ignore[misc]
        cuts[-1] = len(costs)
        return range(cuts[self.rank], cuts[self.rank + 1])

    def _from(self, source: int, value: Callable[[], T] | None = None) -> Any:
        """What the rank `source` says; it alone asks for the value."""
        found = value() if value is not None and source == self.rank else None
        return found if self.wire is None else self.wire.share(found, source)


ALONE = Ranks()

_HERE: ContextVar[Ranks] = ContextVar("ranks", default=ALONE)


def here() -> Ranks:
    """This process among those that do the command together."""
    return _HERE.get()


def deal(costs: Sequence[float], count: int) -> list[list[int]]:
    """The numbers of things with these costs for each of so many ranks: the dearest first, each to whom has
    least so far."""
    shares, loads = [list[int]() for _ in range(count)], [0.0] * count
    for at in sorted(range(len(costs)), key=lambda each: -costs[each]):
        rank = loads.index(min(loads))
        shares[rank].append(at)
        loads[rank] += costs[at]
    return shares


@contextmanager
def joined() -> Iterator[Ranks]:
    """This process among those that torchrun has started, while the block runs; `ALONE` without torchrun,
    whatever a scheduler says in the variables that both use.

    The first runs its command in the block, the others `serve`. RankError where they do not find each other.
    """
    if TORCHRUN not in os.environ:
        yield ALONE
        return
    try:
        rank, count, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    except (KeyError, ValueError):
        raise RankError(
            f"{TORCHRUN} is set, but RANK, WORLD_SIZE and LOCAL_RANK are not all numbers; start with "
            f"torchrun, or unset {TORCHRUN}"
        ) from None
    if count < 2:
        yield ALONE
        return
    from moequant.ranks.wire import Wire  # torch is imported only where there is more than one

    wire = Wire()
    ranks = Ranks(rank, count, local, wire)
    token = _HERE.set(ranks)
    try:
        yield ranks
        ranks.leave()
    except SystemExit as left:  # how the command line ends, well or not
        if not left.code:
            ranks.leave()
        raise
    finally:
        _HERE.reset(token)
        wire.close()
