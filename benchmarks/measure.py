"""Figures that hold on a machine shared with other work: CPU time, turns, medians, paired ratios."""

from __future__ import annotations

import math
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from torch import Tensor

T = TypeVar("T")


def cpu(work: Callable[[], T]) -> tuple[T, float]:
    """The result and the CPU seconds of this process that it took."""
    began = time.process_time()
    result = work()
    return result, time.process_time() - began


def ended(process: int) -> tuple[int, resource.struct_rusage, int]:
    """How a child ended, what it used, and the most memory that it was seen with, in bytes.

    `ru_maxrss` is no such figure: a process that this one starts begins with the size of this one, and each
    stage of a conversion lets Linux count anew.
    """
    peak, status = 0, Path(f"/proc/{process}/status")
    while True:
        gone, code, used = os.wait4(process, os.WNOHANG)
        if gone:
            return code, used, peak
        with suppress(OSError, IndexError):
            peak = max(peak, int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024)
        time.sleep(0.02)


def clock(work: Callable[[], T]) -> tuple[T, float]:
    """The result and the seconds that passed."""
    began = time.perf_counter()
    result = work()
    return result, time.perf_counter() - began


def alternate(works: Mapping[str, Callable[[], float]], turns: int) -> dict[str, float]:
    """Each tells its seconds in turn, A B A B; the medians."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(turns):
        for name, work in works.items():
            taken[name].append(work())
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def ratio(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
    """Mean of ours over mean of theirs, with the standard error of ours - ratio · theirs, paired."""
    value = float(ours.mean() / theirs.mean())
    error = float((ours - value * theirs).std() / len(ours) ** 0.5 / theirs.mean())
    return value, error


def below(ours: Tensor, size: int, others: Mapping[int, Tensor]) -> tuple[float | None, float | None]:
    """Mean of ours over what `others`, by size, would have at that size, with its standard error, paired.

    The logarithm of the mean is on the lowest straight line between two of them, one not larger and one not
    smaller; None where there is none of either.
    """
    lines = [
        (at, one, two)
        for low, one in others.items()
        for high, two in others.items()
        if low <= size <= high
        for at in [(size - low) / (high - low) if high > low else 0.0]
    ]
    if not lines:
        return None, None

    def height(line: tuple[float, Tensor, Tensor]) -> float:
        at, one, two = line
        return (1 - at) * math.log(one.mean()) + at * math.log(two.mean())

    at, one, two = lowest = min(lines, key=height)
    value = float(ours.mean()) / math.exp(height(lowest))
    shares = ours / ours.mean() - (1 - at) * one / one.mean() - at * two / two.mean()
    return value, value * float(shares.std() / len(ours) ** 0.5)


def geometric_mean(values: Iterable[float]) -> float:
    """Of positive numbers."""
    return math.exp(statistics.fmean(map(math.log, values)))
