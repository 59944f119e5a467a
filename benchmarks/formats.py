"""Error and speed of every format against ggml, side by side in one process.

    python benchmarks/formats.py --out benchmarks/results/formats.md
    python benchmarks/formats.py --types Q4_K Q2_K --efforts default

Error: twelve tensors (Gaussian, heavy-tailed, with outlier columns; importance flat, log-normal, with
channels times 100, with a tenth of the channels at 0), packed by ggml and by each effort. Every figure
is our squared error over ggml's, for the bytes each wrote given the same importance, weighted by
what the format minimises by default ("own"), by importance alone, by ggml's own
importance · sqrt(c·mean(x²) + x²), and not at all: geometric means over the twelve.

Speed: weights per second of CPU time on one thread, importance given, compiled kernels; ggml and ours take
turns, and medians count. On a GPU (--device cuda) ggml stays on the CPU and ours is timed by the clock.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moequant import formats
from moequant.formats.base import Effort, Format
from tests.formats import ggml

SHAPE = (2, 48, 2048)  # experts, rows, columns of a tensor whose error is measured
LARGE = (8, 512, 2048)  # of the one that is timed
TURNS = 5


def weights(kind: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """f32: uneven rows, and by kind normal values, Student's t with 4 degrees, or 1 column in 100 times 8."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g)
    if kind == "heavy-tailed":
        x /= torch.randn(4, *shape, generator=g).square().mean(0).sqrt()
    if kind == "outlier columns":
        x[..., torch.randperm(shape[-1], generator=g)[: shape[-1] // 100]] *= 8
    return 0.02 * x * torch.exp(0.3 * torch.randn(*shape[:-1], 1, generator=g))


def importance(kind: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """f32 [experts, columns]."""
    g = torch.Generator().manual_seed(seed)
    v = torch.ones(shape[0], shape[-1])
    if kind == "flat":
        return v
    v = torch.exp(torch.randn(v.shape, generator=g))
    some = torch.rand(v.shape, generator=g)
    if kind == "channels x100":
        v[some < 8 / shape[-1]] *= 100
    if kind == "zeros":
        v[some < 0.1] = 0
    return v


def cases() -> Iterator[tuple[str, Tensor, Tensor]]:
    for i, kind in enumerate(("Gaussian", "heavy-tailed", "outlier columns")):
        for j, form in enumerate(("flat", "log-normal", "channels x100", "zeros")):
            x = weights(kind, SHAPE, 100 + i)
            yield f"{kind}, {form}", x, importance(form, SHAPE, 200 + j)


def loss(fmt: Format, x: Tensor, v: Tensor, q: Tensor, magnitude: float) -> float:
    """sum(importance · (c·mean(x²) + x²)^(magnitude / 2) · (x - q)²) in f64."""
    blocks = x.double().reshape(-1, fmt.block)
    square = blocks.square()
    factor = (fmt.spread * square.mean(-1, keepdim=True) + square) ** (magnitude / 2)
    w = v.double()[:, None].expand(x.shape).reshape(-1, fmt.block) * factor
    return float((w * (blocks - q.double().reshape(-1, fmt.block)).square()).sum())


def errors(fmt: Format, efforts: list[Effort], device: str) -> dict[str, list[float]]:
    """effort -> geometric means of our error over ggml's: own, importance, ggml's, plain; worst of own."""
    ratios: dict[str, list[list[float]]] = {e: [] for e in efforts}
    for _, x, v in cases():
        flat = torch.ones_like(v)
        scores: list[Callable[[Tensor], float]] = [
            lambda q, x=x, v=v: loss(fmt, x, v, q, fmt.magnitude),
            lambda q, x=x, v=v: loss(fmt, x, v, q, 0.0),
            lambda q, x=x, v=v: loss(fmt, x, v, q, 1.0),
            lambda q, x=x, flat=flat: loss(fmt, x, flat, q, 0.0),
        ]
        theirs = ggml.dequantize(fmt, ggml.quantize(fmt, x, v))
        for effort in efforts:
            packed = formats.quantize(fmt, x.to(device), v.to(device), effort)
            ours = formats.dequantize(fmt, packed).cpu()
            ratios[effort].append([score(ours) / score(theirs) for score in scores])
    table = {}
    for effort, rows in ratios.items():
        columns = list(zip(*rows, strict=True))
        table[effort] = [math.exp(statistics.fmean(map(math.log, c))) for c in columns] + [max(columns[0])]
    return table


def speeds(fmt: Format, efforts: list[Effort], device: str) -> dict[str, float]:
    """Million weights per second: of ggml (key "ggml") and of each effort."""
    x = weights("Gaussian", LARGE, 1).bfloat16()
    v = importance("log-normal", LARGE, 2)
    here, there = x.to(device), v.to(device)
    for effort in efforts:
        formats.quantize(fmt, here, there, effort, threads=1)  # compiles
    taken: dict[str, list[float]] = {"ggml": [], **{e: [] for e in efforts}}
    for _ in range(TURNS):
        began = time.process_time()
        ggml.quantize(fmt, x[:1], v[:1])
        taken["ggml"].append((time.process_time() - began) * len(x))
        for effort in efforts:
            taken[effort].append(
                timed(lambda e=effort: formats.quantize(fmt, here, there, e, threads=1), device)
            )
    return {k: x.numel() / statistics.median(t) / 1e6 for k, t in taken.items()}


def timed(work: Callable[[], object], device: str) -> float:
    """Seconds of CPU time, or of the clock on a GPU."""
    if device == "cpu":
        began = time.process_time()
        work()
        return time.process_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def hardware(device: str) -> str:
    """The processor as the kernel names it, and the GPU."""
    info = Path("/proc/cpuinfo")
    names = [
        line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
    ]
    cpu = f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores ({platform.machine()})"
    cpu += f", {torch.backends.cpu.get_cpu_capability()}"
    return cpu if device == "cpu" else f"{torch.cuda.get_device_name()}; ggml on {cpu}"


def report(names: list[str], efforts: list[Effort], device: str) -> Iterator[str]:
    """The result table in Markdown, line by line."""
    yield "# Formats against ggml\n"
    yield f"`benchmarks/formats.py`, {date.today()}, torch {torch.__version__}, {hardware(device)}."
    yield f"Load average at the start: {os.getloadavg()[0]:.1f}.\n"
    yield "Error: ours / ggml's, geometric mean of twelve tensors; *worst* is the largest of the twelve."
    yield "p is the exponent of the magnitude factor that the type minimises by default (*own*)."
    yield "Speed: million weights per second of one core, importance given.\n"
    columns = "type, bits, p, effort, own, worst, importance, ggml's, plain, ggml Mw/s, Mw/s, times ggml"
    yield f"| {columns.replace(', ', ' | ')} |"
    yield "|---" * 12 + "|"
    for name in names:
        fmt = formats.get(name)
        error, speed = errors(fmt, efforts, device), speeds(fmt, efforts, device)
        for effort in efforts:
            own, imp, ggmls, plain, worst = error[effort]
            yield (
                f"| {name} | {fmt.bits:.4g} | {fmt.magnitude:g} | {effort} | {own:.3f} | {worst:.3f} "
                f"| {imp:.3f} | {ggmls:.3f} | {plain:.3f} | {speed['ggml']:.1f} | {speed[effort]:.1f} "
                f"| {speed[effort] / speed['ggml']:.2f} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    quantized = [f.name for f in formats.FORMATS.values() if f.block > 1]
    parser.add_argument("--types", nargs="+", default=quantized, choices=quantized)
    parser.add_argument("--efforts", nargs="+", default=["fast", "default", "best"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    lines = []
    for line in report(args.types, args.efforts, args.device):
        print(line, flush=True)
        lines.append(line)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
