"""Figures that hold on a machine shared with other work: CPU time, turns, medians, paired ratios."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from torch import Tensor

T = TypeVar("T")


def cpu(work: Callable[[], T]) -> tuple[T, float]:
    """The result and the CPU seconds of this process that it took."""
    began = time.process_time()
    result = work()
    return result, time.process_time() - began


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


def geometric_mean(values: Iterable[float]) -> float:
    """Of positive numbers."""
    return math.exp(statistics.fmean(map(math.log, values)))
