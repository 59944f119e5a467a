"""A long run in plain lines on stderr, where no terminal shows its bars: logs, CI, nohup."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TextIO

from moequant.progress import Progress, StageCost, resident_bytes, span

SILENT = 30.0
"""Seconds of a run that are not spoken of: what a person waits for needs no log."""

OFTEN, SELDOM = 30.0, 300.0
"""Seconds between two lines within a stage: at first, when somebody looks whether all is well, and in runs of
hours, of which a person wants a page."""

YOUNG = 10.0
"""Seconds of a step that are not spoken of: a short one is soon over."""

SHARE = 0.05
"""Of the run so far: with it the seconds between two lines grow from `OFTEN` to `SELDOM`."""

UNITS = {"tok": "tokens", "w": "weights"}
"""What bars abbreviate."""

SCALES = ((1e9, " billion"), (1e6, " million"))

PERIODS = ((1, "a second"), (60, "a minute"), (3600, "an hour"))

NOTHING = Progress("")


@dataclass(slots=True)
class Lines:
    """Listens to a run: a line on `stream` when a stage ends and, with `steps`, now and then within one.

    Every line begins with the time since the first stage began. A run that is over within `silent` seconds
    says nothing; one that is not says then also how its first stages ended.
    """

    stream: TextIO
    steps: bool = True
    silent: float = SILENT
    clock: Callable[[], float] = time.monotonic
    _began: float | None = None
    _said: float = 0.0
    _held: list[str] = field(default_factory=list)
    _stage: str = ""
    _counts: dict[str, None] = field(default_factory=dict)
    _first: Progress = NOTHING
    _first_at: float = 0.0

    def __call__(self, step: Progress) -> None:
        """See the class."""
        now = self.clock()
        if self._began is None:
            self._began = self._said = now
        ran = now - self._began
        if step.cost is not None:
            self._held.append(f"{_time(ran)} {_ended(step.cost, tuple(self._counts))}")
            self._stage = ""
            self._flush(now)
        elif step.total is None:
            self._stage = step.stage
            self._counts.clear()
        elif step.done <= self._first.done or _kind(step) != _kind(self._first):
            self._first, self._first_at = step, now
            name = f"{step.stage} " if self._named(step) else ""
            self._counts[f"{name}{_number(step.total, step.total)} {_unit(step)}"] = None
        elif self._due(step.done < step.total, ran, now):
            self._held.append(f"{_time(ran)} {self._where(step, step.total, now)}")
            self._flush(now)

    def _due(self, unfinished: bool, ran: float, now: float) -> bool:
        """Whether it is time for a line within a step."""
        pause = min(max(OFTEN, SHARE * ran), SELDOM)
        old = ran >= self.silent and now - self._first_at >= YOUNG
        return self.steps and unfinished and old and now - self._said >= pause

    def _where(self, step: Progress, total: float, now: float) -> str:
        """Where a stage stands: what is done, how fast, time left, memory."""
        worked = step.done - step.given - (self._first.done - self._first.given)
        rate = worked / max(now - self._first_at, 1e-9)
        done = f"{_number(step.done, total, scale=False)} of {_number(total, total)}"
        name = f" ({step.stage})" if self._named(step) else ""
        counted = f"{self._stage or step.stage}: {done} {_unit(step)}{name}"
        pace = f"{_rate(rate)}, {span((total - step.done) / rate)} left, " if rate > 0 else ""
        return f"{counted}, {pace}{resident_bytes() / 1e9:.1f} GB"

    def _named(self, step: Progress) -> bool:
        """Whether what is counted has another name than its stage."""
        return not (self._stage or step.stage).startswith(step.stage)

    def _flush(self, now: float) -> None:
        """Say what is held, unless the run is young."""
        assert self._began is not None
        if now - self._began < self.silent:
            return
        lines, self._held, self._said = self._held, [], now
        try:
            self.stream.write("".join(f"{line}\n" for line in lines))
            self.stream.flush()
        except OSError:  # a log that is full or gone is no reason to end a run of hours
            return


def _kind(step: Progress) -> tuple[str, float | None]:
    return step.stage, step.total


def _time(seconds: float) -> str:
    """Hours, minutes and seconds."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def _ended(cost: StageCost, counts: tuple[str, ...]) -> str:
    """What a stage took, and what it counted."""
    did = f" ({', '.join(counts)})" if counts else ""
    return f"{cost.name}: done in {span(cost.seconds)}, {cost.peak_bytes / 1e9:.1f} GB at most{did}"


def _unit(step: Progress) -> str:
    """What is counted."""
    return UNITS.get(step.unit, f"{step.unit}s")


def _number(count: float, total: float, scale: bool = True) -> str:
    """A count, in the scale of the total."""
    for size, name in SCALES:
        if total >= size:
            return f"{count / size:.2f}{name if scale else ''}"
    return f"{count:,.0f}"


def _rate(rate: float) -> str:
    """Units a second, or in the shortest period in which there is one."""
    seconds, period = next((each for each in PERIODS if rate * each[0] >= 1), PERIODS[-1])
    count = rate * seconds
    return f"{_number(count, count) if count >= 100 else f'{count:.1f}'} {period}"
