"""A run without a terminal says in plain lines where it stands; a short one says nothing."""

from __future__ import annotations

import errno
import io
import re
from itertools import pairwise

import pytest

from moequant.cli.lines import OFTEN, SELDOM, SILENT, Lines
from moequant.progress import Progress, StageCost, span

LINE = re.compile(r"\d+:\d\d:\d\d [a-z][^\x00-\x1f\x7f-\x9f]*")
"""A line of progress: none of them looks like an error."""


class Clock:
    """Time that a test moves."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def told(*steps: tuple[float, Progress], steps_too: bool = True, silent: float = SILENT) -> list[str]:
    """What is said of steps, each so many seconds after the one before; memory figures as ?."""
    clock, stream = Clock(), io.StringIO()
    lines = Lines(stream, steps_too, silent, clock)
    for seconds, step in steps:
        clock.now += seconds
        lines(step)
    found = stream.getvalue().splitlines()
    assert all(LINE.fullmatch(line) for line in found), found
    return [re.sub(r"[0-9.]+ GB$", "? GB", line) if "at most" not in line else line for line in found]


def end(name: str, seconds: float) -> Progress:
    return Progress(name, cost=StageCost(name, seconds, 2_140_000_000))


def test_a_run_says_what_each_stage_took_and_how_far_a_long_one_is() -> None:
    quick = [(0, Progress("open")), (2, end("open", 2))]
    route = [(0, Progress("route")), (1, Progress("calibrate", 0, 131_072, "tok"))]
    route += [(10, Progress("calibrate", 16_384 * n, 131_072, "tok")) for n in range(1, 9)]
    plan = [(0, Progress("plan")), (0, Progress("errors", 0, 41, "tensor"))]
    plan += [(0, Progress("probe", 0, 4, "layer")), (90, Progress("probe", 1, 4, "layer"))]
    last = [(0, Progress("quantize Q4_K_M")), (0, Progress("quantize", 0, 1_250_000_000, "w"))]
    last += [(100, Progress("quantize", 420_000_000, 1_250_000_000, "w")), (9, end("quantize Q4_K_M", 109))]
    assert told(*quick, *route, (1, end("route", 82)), *plan, (1, end("plan", 91)), *last) == [
        "0:00:02 open: done in 2 s, 2.1 GB at most",
        "0:00:33 route: 49,152 of 131,072 tokens (calibrate), 1,638 a second, 50 s left, ? GB",
        "0:01:03 route: 98,304 of 131,072 tokens (calibrate), 1,638 a second, 20 s left, ? GB",
        "0:01:24 route: done in 1 min 22 s, 2.1 GB at most (calibrate 131,072 tokens)",
        "0:02:54 plan: 1 of 4 layers (probe), 40.0 an hour, 4 min 30 s left, ? GB",
        "0:02:55 plan: done in 1 min 31 s, 2.1 GB at most (errors 41 tensors, probe 4 layers)",
        "0:04:35 quantize Q4_K_M: 0.42 of 1.25 billion weights, 4.20 million a second, 3 min 18 s left, ? GB",
        "0:04:44 quantize Q4_K_M: done in 1 min 49 s, 2.1 GB at most (1.25 billion weights)",
    ]


def test_what_took_no_time_says_nothing_about_the_rest() -> None:
    """Half was there when the run went on, and a tenth was found at once."""
    steps = [(0, Progress("quantize")), (0, Progress("quantize", 50, 100, "w", given=50))]
    steps += [(40, Progress("quantize", 60, 100, "w", given=60))]
    steps += [(40, Progress("quantize", 80, 100, "w", given=60))]
    assert told(*steps) == [
        "0:00:40 quantize: 60 of 100 weights, ? GB",
        "0:01:20 quantize: 80 of 100 weights, 15.0 a minute, 1 min 20 s left, ? GB",
    ]


def test_a_short_run_says_nothing_unless_asked_for_all() -> None:
    short = [(0, Progress("open")), (3, end("open", 3)), (0, Progress("compare", 0, 2, "layer"))]
    short += [(12, Progress("compare", 1, 2, "layer")), (12, end("compare", 24))]
    assert not told(*short)
    assert told(*short, silent=0) == [
        "0:00:03 open: done in 3 s, 2.1 GB at most",
        "0:00:27 compare: done in 24 s, 2.1 GB at most (2 layers)",
    ]


def test_a_step_that_is_soon_over_is_no_line() -> None:
    steps = [(0, Progress("quantize")), (40, Progress("verify")), (0, Progress("verify", 0, 99, "tensor"))]
    assert not told(*steps, (1, Progress("verify", 79, 99, "tensor")))


def test_where_bars_are_drawn_no_step_is_said() -> None:
    steps = [(0, Progress("compare")), (0, Progress("compare", 0, 3, "layer"))]
    steps += [(100, Progress("compare", n, 3, "layer")) for n in (1, 2, 3)]
    assert told(*steps, (1, end("compare", 301)), steps_too=False) == [
        "0:05:01 compare: done in 5 min 1 s, 2.1 GB at most (3 layers)"
    ]


def test_a_run_of_a_day_is_told_in_some_hundred_lines() -> None:
    day = [
        (0, Progress("quantize", 0, 86_400, "w")),
        *((1, Progress("quantize", n, 86_400, "w")) for n in range(1, 86_400)),
    ]
    found = [line.split()[0].split(":") for line in told(*day)]
    at = [int(hours) * 3600 + int(minutes) * 60 + int(seconds) for hours, minutes, seconds in found]
    gaps = [after - before for before, after in pairwise([0, *at])]
    assert min(gaps) == OFTEN and max(gaps) == SELDOM and 250 < len(at) < 350


def test_a_stage_that_goes_on_after_it_was_killed_has_the_rate_of_this_run() -> None:
    steps = [(0, Progress("calibrate", 900, 1000, "tok")), (40, Progress("calibrate", 940, 1000, "tok"))]
    assert told(*steps) == ["0:00:40 calibrate: 940 of 1,000 tokens, 1.0 a second, 1 min 0 s left, ? GB"]


def test_a_log_that_cannot_be_written_ends_no_run() -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, text)

    lines = Lines(Full(), silent=0)
    lines(end("route", 1))
    lines(end("plan", 1))


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7800, "2 h 10 min"), (273_600, "3 d 4 h")],
)
def test_times_as_people_say_them(seconds: float, said: str) -> None:
    assert span(seconds) == said
