"""Memory, reads and speed of a model that streams."""

from __future__ import annotations

import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from benchmarks.data import CALIB, DEMO, MIX, rows
from benchmarks.harness import Rows, case
from benchmarks.llama import exact_file
from benchmarks.synthetic import FULL, SMALL, build
from moequant import Settings, convert
from moequant.checkpoint import load, open_checkpoint
from moequant.evaluate.open_source import open_source
from moequant.evaluate.side_by_side import Version, compare
from moequant.forward.resources import Resources
from moequant.forward.stream import Reader
from moequant.progress import Meter
from moequant.runtimes.llama_cpp.engine import Llama
from moequant.statistics.calibrate import calibrate
from moequant.text.rows import ROW

SHAPES = {"full": FULL, "small": replace(SMALL, layers=2, experts=8)}


@dataclass(frozen=True)
class Streaming:
    """`size` is "full", a checkpoint of about 6 GB for which 14 GB of disk are needed, or "small"."""

    size: str = "full"
    routed: int = 2_048
    tokens: int = FULL.tokens
    compared: int = 4_096


@case("Streaming: memory and reads of a checkpoint of 6 GB", Streaming("small", 1024, 1024, 1024))
def streaming(o: Streaming) -> Rows:
    """Routing, conversion and comparison of a synthetic checkpoint, each in a fresh process. Peaks are
    resident bytes, interpreter and libraries included."""
    with tempfile.TemporaryDirectory(prefix="moequant-streaming-") as name:
        folder, shape = Path(name), SHAPES[o.size]
        assert shutil.disk_usage(folder).free > 3 * shape.layers * shape.layer_bytes, f"{folder}: too small"
        build(folder / "model", shape)
        yield alone(routed, folder / "model", o.routed, Resources())
        yield from alone(converted, folder / "model", folder / "out.gguf", o.tokens)
        yield alone(compared, folder / "model", folder / "out.gguf", o.compared)


@dataclass(frozen=True)
class Depth:
    """Layers of two models."""

    layers: tuple[int, ...] = (2, SMALL.layers)


@case("Memory by depth: a deeper model may not need more", Depth((2, 4)))
def depth(o: Depth) -> Rows:
    """Growth is the peak of the calibration pass over the peak just before it, in a fresh process. glibc
    keeps freed blocks below 32 MB; MALLOC_MMAP_THRESHOLD_=1048576 in the environment makes it give them
    back."""
    for layers in o.layers:
        shape = replace(SMALL, layers=layers)
        with tempfile.TemporaryDirectory(prefix="moequant-") as name:
            build(Path(name), shape)
            found = alone(routed, Path(name), shape.tokens, Resources(threads=1))
        yield {"layers": layers, "layer bytes": shape.layer_bytes} | found


def alone(action: Callable[..., Any], *arguments: Any) -> Any:
    """The action in a fresh process: its peak is nobody else's."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(action, *arguments).result()


def routed(folder: Path, tokens: int, resources: Resources) -> dict[str, Any]:
    """One calibration pass: what it read, how long it took, its peak."""
    torch.set_num_threads(1)
    checkpoint, reader, meter = open_checkpoint(folder), Reader(), Meter()
    text = rows(folder, None, count=tokens // ROW)
    with meter.stage("idle"):
        pass
    with meter.stage("route"):
        calibrate(checkpoint, text, resources, reader)
    idle, route = meter.costs
    return {
        "seconds": route.seconds,
        "tokens": text.ids.numel(),
        "peak": route.peak_bytes,
        "growth": route.peak_bytes - idle.peak_bytes,
        "checkpoint": checkpoint.source_bytes,
        "share read": reader.bytes / checkpoint.source_bytes,
        "reads of a tensor": max(reader.reads.values()),
        "unread": ", ".join(each.name for each in checkpoint.weights if each.name not in reader.reads),
    }


def converted(folder: Path, out: Path, tokens: int) -> list[dict[str, Any]]:
    """The whole conversion but for the comparison, stage by stage."""
    report = convert(folder, out, Settings("Q4_K_M", calib_tokens=tokens, eval_tokens=0, effort="fast"))
    return [{"stage": c.name, "seconds": c.seconds, "peak": c.peak_bytes} for c in report.stages]


def compared(folder: Path, out: Path, tokens: int) -> dict[str, Any]:
    """The comparison of checkpoint and file."""
    checkpoint, meter = open_checkpoint(folder), Meter()
    text, source = rows(folder, None, "evaluation", tokens // ROW), open_source(out, checkpoint)
    with meter.stage("compare"):
        compare(checkpoint, Version("checkpoint", load), [Version(source.name, source.provider)], text)
    (cost,) = meter.costs
    return {"stage": "compare", "seconds": cost.seconds, "peak": cost.peak_bytes}


@dataclass(frozen=True)
class Speed:
    """`rounds` turns."""

    model: Path = MIX
    text: Path | None = CALIB
    tokens: int = FULL.tokens
    rounds: int = 3


@case("Tokens per second of a pass beside llama.cpp's forward", Speed(DEMO, None, 1024, 1), ("llama.cpp",))
def speed(o: Speed) -> Rows:
    """The same rows in turn on one thread, between matrix multiplications that say how fast the machine was.
    Our pass also gathers statistics; llama.cpp makes no logits but of the last token."""
    checkpoint, text = open_checkpoint(o.model), rows(o.model, o.text, count=o.tokens // ROW)
    count = text.ids.numel()
    with tempfile.TemporaryDirectory() as name:
        with Llama(exact_file(o.model, Path(name)), n_ctx=ROW, threads=1) as llama:

            def theirs() -> None:
                for row in text.ids:
                    llama.generate(row[:-1].tolist(), 1)

            llama.generate(text.ids[0, :-1].tolist(), 1)
            for turn in range(o.rounds):
                before = matmul_rate()
                ours = count / measure.clock(lambda: calibrate(checkpoint, text, Resources(threads=1)))[1]
                other = (count - len(text.ids)) / measure.clock(theirs)[1]
                rate = max(before, matmul_rate()) / 1e9
                row = {"round": turn + 1, "matmul GFLOP/s": rate, "our tokens/s": ours}
                yield row | {"llama.cpp's": other, "ours / llama.cpp's": ours / other}


def matmul_rate() -> float:
    """float32 operations per second of one thread, best of a few products of 1024 x 1024."""
    a, b = torch.randn(2, 1024, 1024)
    best = 0.0
    for _ in range(8):
        start = time.perf_counter()
        a @ b
        best = max(best, 2 * 1024**3 / (time.perf_counter() - start))
    return best
