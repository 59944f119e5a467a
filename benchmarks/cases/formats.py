"""Formats against ggml."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.harness import Rows, case
from benchmarks.tensors import importance, loss, twelve, weights
from moequant import formats
from moequant.formats import Effort, Format
from tests.formats import ggml

LARGE = (8, 512, 2048)
"""Experts, rows, columns of the tensor that is timed."""

QUANTIZED = tuple(fmt.name for fmt in formats.FORMATS.values() if fmt.block > 1)


@dataclass(frozen=True)
class Formats:
    """`rows` of each expert of the tensors whose error is measured; `turns` of the clock."""

    types: tuple[str, ...] = QUANTIZED
    efforts: tuple[Effort, ...] = ("fast", "default", "best")
    device: str = "cpu"
    rows: int = 48
    experts: int = LARGE[0]
    turns: int = 5


@case(
    "Error and speed of every format against ggml's", Formats(("Q4_K",), ("fast",), "cpu", 2, 1, 1), ("ggml",)
)
def formats_(o: Formats) -> Rows:
    """Error: twelve tensors packed by ggml and by each effort; ours over ggml's, geometric means, by what
    the format minimises by default ("own", with p the exponent of its magnitude factor), by importance
    alone, by ggml's own importance · sqrt(c·mean(x²) + x²), and not weighted at all. Speed: million weights
    per second of CPU time on one thread, importance given, kernels compiled, in turns with ggml; on a GPU
    (--device cuda) ggml stays on the CPU and ours is timed by the clock."""
    for name in o.types:
        fmt = formats.get(name)
        error, speed = errors(fmt, o), speeds(fmt, o)
        for effort in o.efforts:
            yield (
                {"type": name, "bits": fmt.bits, "p": fmt.magnitude, "effort": effort}
                | error[effort]
                | {"ggml Mw/s": speed["ggml"], "Mw/s": speed[effort]}
                | {"times ggml": speed[effort] / speed["ggml"]}
            )


def errors(fmt: Format, o: Formats) -> dict[str, dict[str, float]]:
    """effort -> geometric means of our error over ggml's, by objective, and the worst by our own."""
    ratios: dict[str, list[list[float]]] = {effort: [] for effort in o.efforts}
    for x, v in twelve(o.rows):
        scores: list[Callable[[Tensor], float]] = [
            partial(loss, fmt, x, v),
            partial(loss, fmt, x, v, magnitude=0.0),
            partial(loss, fmt, x, v, magnitude=1.0),
            partial(loss, fmt, x, torch.ones_like(v), magnitude=0.0),
        ]
        theirs = ggml.dequantize(fmt, ggml.quantize(fmt, x, v))
        for effort in o.efforts:
            packed = formats.quantize(fmt, x.to(o.device), v.to(o.device), effort)
            ours = formats.dequantize(fmt, packed).cpu()
            ratios[effort].append([score(ours) / score(theirs) for score in scores])
    table = {}
    for effort, rows in ratios.items():
        columns = dict(zip(("own", "importance", "ggml's", "plain"), zip(*rows, strict=True), strict=True))
        table[effort] = {name: measure.geometric_mean(column) for name, column in columns.items()}
        table[effort]["worst"] = max(columns["own"])
    return table


def speeds(fmt: Format, o: Formats) -> dict[str, float]:
    """Million weights per second: of ggml (key "ggml") and of each effort."""
    x = weights("Gaussian", (o.experts, *LARGE[1:]), 1).bfloat16()
    v = importance("log-normal", tuple(x.shape), 2)
    here, there = x.to(o.device), v.to(o.device)

    def ours(effort: Effort) -> float:
        pack = partial(formats.quantize, fmt, here, there, effort, threads=1)
        return (
            measure.cpu(pack)[1] if o.device == "cpu" else measure.clock(lambda: (pack(), synchronize()))[1]
        )

    def theirs() -> float:
        return measure.cpu(lambda: ggml.quantize(fmt, x[:1], v[:1]))[1] * len(x)

    for effort in o.efforts:
        ours(effort)  # compiles
    works = {"ggml": theirs} | {effort: partial(ours, effort) for effort in o.efforts}
    return {name: x.numel() / taken / 1e6 for name, taken in measure.alternate(works, o.turns).items()}


def synchronize() -> None:
    """Wait for the GPU."""
    torch.cuda.synchronize()
