"""Layers of the size of real models."""

from __future__ import annotations

import os
import resource
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases.streaming import alone
from benchmarks.harness import Rows, case
from benchmarks.synthetic import Shape, build
from moequant import Settings, convert
from moequant.text.rows import ROW

QWEN3_30B = Shape(2, 2048, 128, 768, 151_936, 16_384, 8, 32, 4, 128, True)
TINY = Shape(1, 256, 8, 256, 512, 2_048, correlated=True)
SHAPES = {"Qwen3-30B-A3B": QWEN3_30B, "tiny": TINY}


@dataclass(frozen=True)
class RealShapes:
    """A shape by name, with so many layers and experts (0: its own), made a file of that type; `tokens` cross
    it, in `ram` bytes (0: no limit)."""

    shape: str = "Qwen3-30B-A3B"
    type: str = "Q4_K_M"
    layers: int = 0
    experts: int = 0
    vocab: int = 0
    tokens: int = 0
    ram: int = 6 * 10**9
    efforts: tuple[str, ...] = ("fast", "default")


@case("Real shapes: time and memory of layers of real size", RealShapes("tiny", efforts=("default",)))
def real_shapes(o: RealShapes) -> Rows:
    """Conversion of random layers whose inputs are correlated, each effort in a fresh process,
    stage by stage: seconds, CPU seconds, peak resident bytes, bytes read. The last row is about routing, plan
    and rounding together: their CPU seconds times the rate of a matrix product (operations in a CPU second,
    all cores busy, measured right after) over the operations of four passes through the layers and of all
    Grams."""
    given = {"layers": o.layers, "experts": o.experts, "vocab": o.vocab, "tokens": o.tokens}
    shape = replace(SHAPES[o.shape], **{name: value for name, value in given.items() if value})
    with tempfile.TemporaryDirectory(prefix="moequant-shapes-") as name:
        folder = Path(name)
        build(folder / "model", shape)
        for effort in o.efforts:
            found = alone(converted, folder / "model", folder / f"{effort}.gguf", effort, shape, o)
            yield from ({"effort": effort, **row} for row in found)


def converted(model: Path, out: Path, effort: Any, shape: Shape, o: RealShapes) -> list[dict[str, Any]]:
    """The stages of a conversion, all of it, and how its CPU seconds stand to its arithmetic."""
    text = {"calib_tokens": shape.tokens, "eval_tokens": 4096}
    settings = Settings(o.type, **text, effort=effort, ram=o.ram or None)
    report = convert(model, out, settings)
    used = resource.getrusage(resource.RUSAGE_SELF)
    stages = [
        {
            "stage": cost.name,
            "seconds": cost.seconds,
            "CPU seconds": cost.cpu_seconds,
            "peak": cost.peak_bytes,
            "read": cost.read_bytes,
        }
        for cost in report.stages
    ]
    weights = sum(weight.numel for weight in report.checkpoint.weights)
    whole = {"stage": "all", "seconds": sum(cost.seconds for cost in report.stages)}
    peak = max(cost.peak_bytes for cost in report.stages)
    whole |= {"peak": peak, "CPU seconds": used.ru_utime + used.ru_stime, "weights": weights}
    work = [cost for cost in report.stages if cost.name in ("route", "plan", "quantize")]
    spent, rate, operations = sum(cost.cpu_seconds for cost in work), product_rate(), arithmetic(shape)
    share = {"stage": "times the arithmetic", "CPU seconds": spent, "rate": rate, "operations": operations}
    return [*stages, whole, share | {"times": spent * rate / operations}]


def product_rate(size: int = 2048, seconds: float = 3.0) -> float:
    """Operations a CPU second of f32 matrix products [size, size], one thread for every core."""

    def work(number: int) -> tuple[float, float]:
        torch.set_num_threads(1)
        matrix, out = torch.randn(size, size), torch.empty(size, size)
        began, done = time.thread_time(), 0
        while not done or time.thread_time() - began < seconds:
            torch.mm(matrix, matrix, out=out)
            done += 2 * size**3
        return done, time.thread_time() - began

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(work, range(os.cpu_count() or 1)))
    return sum(done for done, _ in found) / sum(spent for _, spent in found)


def arithmetic(shape: Shape, passes: int = 4) -> float:
    """Operations of so many passes of the text through the layers and of the Grams of what weights are fed,
    two for each expert's: rounded inputs, and those with the original ones."""
    wide, queries, keys = shape.hidden, shape.heads * shape.head, shape.kv_heads * shape.head
    mixer = 4 * wide * (queries + keys) + 4 * ROW * queries
    block = 2 * wide * shape.experts + shape.top_k * 6 * wide * shape.inner
    grams = 4 * (wide**2 + queries**2 + shape.top_k * (wide**2 + shape.inner**2))
    return float(shape.tokens * (shape.layers * (passes * (mixer + block) + grams) + 4 * wide**2))
