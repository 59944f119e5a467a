"""Where a run stands, for a terminal and for who listens; and what each stage costs, one line a stage."""

from __future__ import annotations

import ctypes
import resource
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from tqdm import tqdm

_MEMORY = Path("/proc/meminfo")
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_IO = Path("/proc/self/io")


T = TypeVar("T")

SCALED = 100_000
"""Bars that count further show thousands and millions."""


@dataclass(frozen=True, slots=True)
class StageCost:
    """Wall seconds, peak resident bytes, bytes read from files and processor seconds of one stage.

    Processor seconds are those of this process, and of processes that it started and that ended in the stage.
    Where not on Linux the peak is that of the run so far, and reads are unknown (None).
    """

    name: str
    seconds: float
    peak_bytes: int
    read_bytes: int | None = None
    cpu_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a run was expected to take before it began: wall seconds, processor seconds of all stages and of
    each by its name, and at most so many bytes of memory and of disk."""

    seconds: float
    cpu_seconds: float
    stages: Mapping[str, float]
    memory_bytes: int
    disk_bytes: int

    def __str__(self) -> str:
        longest = sorted(self.stages.items(), key=lambda each: -each[1])[:2]
        shares = ", ".join(f"{name} {cpu / self.cpu_seconds:.0%}" for name, cpu in longest)
        memory, disk = self.memory_bytes / 1e9, self.disk_bytes / 1e9
        return f"about {span(self.seconds)} ({shares}), {memory:.1f} GB of memory and {disk:.1f} GB of disk"


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands: `done` of `total` units of a stage.

    A stage begins with `done` 0; `total` is None, and `unit` empty, where nobody counts in it. Of what is
    done, `given` took no time worth counting, such as what a killed run had finished: it says nothing of the
    rest. `cost` is what a stage took that has ended.
    """

    stage: str
    done: float = 0.0
    total: float | None = None
    unit: str = ""
    cost: StageCost | None = None
    given: float = 0.0


Listener = Callable[[Progress], None]
"""Is called in the thread that works: what it raises ends the run, and nothing of an output is left then."""

_LISTENER: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def listening(listener: Listener | None) -> Iterator[None]:
    """Tell `listener` of every step while the block runs; with None whoever listens already."""
    token = _LISTENER.set(_LISTENER.get() if listener is None else listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


def tell(step: Progress) -> None:
    """Say it to who listens."""
    if (listener := _LISTENER.get()) is not None:
        listener(step)


class Bar:
    """Counts a stage: a bar on a terminal, which says the memory that is used; a call for who listens.

    The time that is left follows from the mean pace of the stage so far, without what was given to it: `done`
    at the start, and what `give` says.
    """

    def __init__(self, stage: str, total: float, unit: str, done: float = 0.0) -> None:
        scaled = total >= SCALED
        self._shown: Any = tqdm(
            desc=stage,
            total=total,
            initial=int(done) if float(done).is_integer() else done,
            unit=unit,
            unit_scale=scaled,
            smoothing=0,  # the mean: steps of a stage differ
            disable=None,
            leave=False,
        )
        self._step = Progress(stage, done, total, unit, given=done)
        self._outer = _BAR.get()
        tell(self._step)

    def give(self, count: float) -> None:
        """So many more are done, and took no time."""
        if not self._shown.disable:
            self._shown.initial += count
        self._step = replace(self._step, given=self._step.given + count)
        self.update(count)

    def at(self, done: float) -> None:
        """So many are done, unless more were already."""
        if done > self._step.done:
            self.update(done - self._step.done)

    def update(self, count: float = 1) -> None:
        """So many more are done."""
        if not self._shown.disable:
            self._shown.set_postfix_str(f"{resident_bytes() / 1e9:.1f} GB", refresh=False)
        self._shown.update(count)
        self._step = replace(self._step, done=self._step.done + count)
        tell(self._step)

    def __enter__(self) -> Bar:
        _BAR.set(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._shown.close()
        _BAR.set(self._outer)


_BAR: ContextVar[Bar | None] = ContextVar("bar", default=None)


def advance(count: float) -> None:
    """So many more are done of what the bar around counts, if there is one: for those who do its work far
    below."""
    if (bar := _BAR.get()) is not None:
        bar.update(count)


def counted(stage: str, items: Collection[T], unit: str) -> Iterator[T]:
    """The items, each counted when it is done with."""
    with Bar(stage, len(items), unit) as bar:
        for item in items:
            yield item
            bar.update()


@dataclass(slots=True)
class Meter:
    """Collects the cost of each stage that runs inside `stage`."""

    costs: list[StageCost] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure the block under that name."""
        tell(Progress(name))
        _give_back()
        _reset_peak()
        start, worked, before = time.perf_counter(), _worked(), _read_bytes()
        yield
        after, worked = _read_bytes(), _worked() - worked
        read = None if before is None or after is None else after - before
        self.costs.append(StageCost(name, time.perf_counter() - start, peak_bytes(), read, worked))
        tell(Progress(name, cost=self.costs[-1]))


def span(seconds: float) -> str:
    """A time as people say it: `45 s`, `3 min 20 s`, `2 h 10 min`, `3 d 4 h`."""
    whole = round(seconds)
    for unit, size, smaller, part in (("d", 86_400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // part} {smaller}"
    return f"{whole} s"


def available_bytes() -> int | None:
    """Memory that a process may still take without swapping, None where Linux does not tell."""
    return _size(_MEMORY, "MemAvailable:")


def total_memory() -> int | None:
    """The machine's memory in bytes, None where Linux does not tell."""
    return _size(_MEMORY, "MemTotal:")


def _worked() -> float:
    """Processor seconds of this process, and of those that it started and that have ended."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime


def _read_bytes() -> int | None:
    """Bytes that this process has read from files, be it from the cache; mapped files are not counted."""
    try:
        for line in _IO.read_text().splitlines():
            if line.startswith("rchar:"):
                return int(line.split()[1])
    except OSError:
        pass
    return None


def _give_back() -> None:
    """Give memory that is free back to the system: glibc keeps it, and it would count for the next stage."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def _reset_peak() -> None:
    try:
        _CLEAR.write_text("5")  # Linux: VmHWM starts again from the present size
    except OSError:
        return


def resident_bytes() -> int:
    """Memory of this process now; its peak so far where Linux does not tell."""
    return _size(_STATUS, "VmRSS:") or peak_bytes()


def peak_bytes() -> int:
    """The most memory that this process had, since its start or the last stage began."""
    return _size(_STATUS, "VmHWM:") or _peak_of_the_run()


def _size(file: Path, key: str) -> int | None:
    """A size that Linux states in kB, in bytes."""
    try:
        for line in file.read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _peak_of_the_run() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
