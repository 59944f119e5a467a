"""The searches for scales in C beside the same by torch, compiled and not."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.cases.loops import settle
from benchmarks.cases.streaming import alone
from benchmarks.harness import Rows, case
from moequant import formats
from moequant.formats import Effort, engine

FORMATS = ("Q4_K", "Q6_K", "Q3_K", "Q2_K", "Q5_0", "Q8_0", "IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ1_M")


@dataclass(frozen=True)
class Searches:
    """Tensors of so many weights, packed with each format in turn."""

    formats: tuple[str, ...] = FORMATS
    effort: Effort = "default"
    large: int = 1 << 23
    small: int = 1 << 19
    turns: int = 2


@case("Searches for scales in C and by torch", Searches(("Q4_0",), "fast", 1 << 16, 1 << 14, 1))
def searches(o: Searches) -> Rows:
    """CPU nanoseconds of one thread for a weight that is packed alone, the best of a few times. By torch,
    large tensors are packed by what torch compiled, small ones without. "First" is the CPU seconds of the
    first large tensor where torch has compiled nothing yet, compilers included. Each in a fresh process, C
    and torch in turn; `lost` is the error of the large one over the energy of its weights."""
    for name in o.formats:
        for turn in range(o.turns):
            both = {who: alone(measured, replace(o, formats=(name,)), who == "C") for who in ("C", "torch")}
            pairs = {f"{what}, {who}": both[who][what] for what in both["C"] for who in both}
            yield {"format": name, "turn": turn + 1} | pairs


def measured(o: Searches, there: bool) -> dict[str, Any]:
    """One format, with the loops or without."""
    settle(there)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    engine.COMPILE_FROM = o.large
    weights, importance = 0.02 * torch.randn(o.large // 1024, 1024), torch.rand(1024) + 0.1

    def seconds(rows: int) -> float:
        began = time.process_time()
        formats.quantize(o.formats[0], weights[:rows], importance, o.effort, threads=1)
        return time.process_time() - began

    with tempfile.TemporaryDirectory(prefix="moequant-searches-") as empty:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = empty
        others = sum(os.times()[2:4])  # of processes that have ended
        first = seconds(len(weights)) + sum(os.times()[2:4]) - others
        large = min(seconds(len(weights)) for _ in range(3))
        small = min(seconds(o.small // 1024) for _ in range(4))
        found = formats.quantize(o.formats[0], weights, importance, o.effort, threads=1)
    error = (formats.dequantize(o.formats[0], found) - weights).square() * importance
    lost = error.double().sum() / (weights.square() * importance).double().sum()
    large, small = 1e9 * large / weights.numel(), 1e9 * small / o.small
    return {"large, ns": large, "small, ns": small, "first, s": first, "lost": float(lost)}
