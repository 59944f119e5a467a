"""How fast this machine is now, measured for about a second: for what a conversion will take."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from math import prod
from statistics import fmean

import torch

from moequant import formats
from moequant.checkpoint import Checkpoint
from moequant.checkpoint.codecs.awq import Awq
from moequant.checkpoint.codecs.gptq import Gptq
from moequant.files.local import LocalFile
from moequant.formats import Effort
from moequant.values import Codec, Stored

Search = Callable[[str], float]
"""By format, how often its plain search handles a weight."""


@dataclass(frozen=True, slots=True)
class Work:
    """Floating-point operations of matrix products, numbers handled one by one, and calls: of torch with next
    to nothing to do, and what else takes as long."""

    products: float = 0.0
    numbers: float = 0.0
    calls: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.products + other.products, self.numbers + other.numbers, self.calls + other.calls)


@dataclass(frozen=True, slots=True)
class Speed:
    """Products, numbers and calls in a CPU second of one core; how many `cores` this process gets now."""

    products: float
    numbers: float
    calls: float
    cores: float

    def seconds(self, work: Work) -> float:
        """CPU seconds of the work."""
        return work.products / self.products + work.numbers / self.numbers + work.calls / self.calls


TYPICAL = Speed(6e10, 5e8, 2.5e5, 1.0)
"""A core of a server of 2021."""


def speed() -> Speed:
    """What this machine does now, by short loops on every core: about a second."""
    count = os.cpu_count() or 1
    x, y = torch.randn(512, 1024), torch.randn(1024, 1024)
    few, least = torch.randn(1 << 16), torch.randn(64)

    def products() -> None:
        x @ y

    def numbers() -> None:
        for _ in range(50):
            ((few * 3).round().clamp(-8, 7) * 0.3 - few).square().sum()

    def calls() -> None:
        for _ in range(1000):
            least + 1

    began, used = time.perf_counter(), time.process_time()
    kinds = products, numbers, calls
    with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        found = list(pool.map(_taken, [kinds] * count))
    cores = (time.process_time() - used) / (time.perf_counter() - began)
    product, number, call = (fmean(kind) for kind in zip(*found, strict=True))
    return Speed(2 * x.numel() * y.shape[1] / product, 50 * few.numel() / number, 1000 / call, cores)


def _taken(kinds: Sequence[Callable[[], object]], seconds: float = 0.6) -> list[float]:
    """CPU seconds of each kind of work, on this thread. They take turns and the mean counts: others use the
    machine now as they will then, now and again."""
    rounds, until = list[list[float]](), time.thread_time() + seconds
    with torch.inference_mode():
        while not rounds or time.thread_time() < until:
            stamps = [time.thread_time()]
            for work in kinds:
                work()
                stamps.append(time.thread_time())
            rounds.append([after - before for before, after in pairwise(stamps)])
    return [fmean(kind) for kind in zip(*rounds[1:] or rounds, strict=True)]  # the first warms up


def searches(now: Speed, effort: Effort) -> Search:
    """How often the plain search for each format handles a weight, measured where it is asked for."""
    return cache(lambda name: now.numbers * _search(name, effort))


def _search(name: str, effort: Effort) -> float:
    """CPU seconds that the plain search for a format takes for a weight, uncompiled."""
    fmt = formats.get(name)
    some = torch.randn(64, fmt.block * max(1, 2048 // fmt.block)) / 32  # a block may be a whole row
    taken = list[float]()
    for _ in range(3):
        began = time.process_time()
        formats.quantize(fmt, some, None, effort)
        taken.append(time.process_time() - began)
    return fmean(taken[1:]) / some.numel()  # the first makes tables


def decoding(checkpoint: Checkpoint, now: Speed) -> float:
    """How often a stored number is handled to be decoded, more than one that is a float: the mean, measured
    on some of each kind. 0 for files that are fetched when they are read."""
    found = dict[tuple[type[Codec], str], float]()
    handled, count = 0.0, 0
    for stored in (each for weight in checkpoint.weights for each in weight.origin.stored):
        ref, numel = next(iter(stored.parts.values())), prod(stored.shape)
        count += numel
        if stored.codec.name == "plain" or len(stored.shape) < 2 or not isinstance(ref.file, LocalFile):
            continue
        kind = type(stored.codec), ref.dtype
        if kind not in found:
            found[kind] = now.numbers * _decoding(stored)
        handled += numel * found[kind]
    return handled / max(1, count)


def _decoding(stored: Stored) -> float:
    """CPU seconds that a number of a matrix takes to be decoded: some rows, or all where the words of all are
    read for any."""
    some = max(1, (1 << 18) // stored.shape[-1])
    rows = range(stored.shape[-2] if isinstance(stored.codec, Awq | Gptq) else min(stored.shape[-2], some))
    taken = list[float]()
    for _ in range(3):
        began = time.process_time()
        values = stored.read(0 if len(stored.shape) > 2 else None, rows)
        taken.append((time.process_time() - began) / values.numel())
    return fmean(taken[1:])  # the first makes tables
