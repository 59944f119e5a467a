"""`fast` beside llama.cpp's own tools at the shape of a real model."""

from __future__ import annotations

import math
import os
import resource
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.cases.real_shapes import SHAPES
from benchmarks.cases.streaming import alone
from benchmarks.data import CALIB, ONE_TEXT
from benchmarks.harness import Rows, case
from benchmarks.synthetic import build
from moequant import Settings, convert
from moequant.text.rows import ROW


@dataclass(frozen=True)
class Fast:
    """A shape of real-shapes, with so many layers and tokens (0: its own). llama.cpp's tools read files of
    the types `exact`, made by us, and run on `threads` (0: all cores)."""

    shape: str = "Qwen3-30B-A3B"
    text: Path = CALIB
    layers: int = 0
    tokens: int = 0
    type: str = "Q4_K_M"
    exact: tuple[str, ...] = ("BF16", "F16")
    turns: int = 2
    threads: int = 0


@case(
    "The fast effort beside llama-imatrix and llama-quantize",
    Fast("tiny", ONE_TEXT, 1, 1024, exact=("BF16",), turns=1, threads=1),
    ("llama-quantize", "llama-imatrix"),
)
def fast(o: Fast) -> Rows:
    """Random layers whose inputs are correlated, the same text, tokens and types, in turn. Ours are the CPU
    seconds of the stages `route` and `quantize` in a fresh process, and of the whole command with its
    checks; theirs are those of the two programs, for llama-imatrix without perplexities. The ratio is ours
    over theirs."""
    shape = SHAPES[o.shape]
    shape = replace(shape, layers=o.layers or shape.layers, tokens=o.tokens or shape.tokens)
    with tempfile.TemporaryDirectory(prefix="moequant-fast-") as name:
        folder = Path(name)
        build(folder / "model", shape)
        for kind in o.exact:
            convert(folder / "model", folder / f"{kind}.gguf", Settings(kind, eval_tokens=0))
        for turn in range(o.turns):
            ours = alone(converted, folder / "model", folder / "ours.gguf", o, shape.tokens)
            yield {"turn": turn, "who": "moequant"} | ours
            for kind in o.exact:
                theirs = tools(folder, kind, o, shape.tokens)
                yield (
                    {"turn": turn, "who": f"llama.cpp, {kind}"}
                    | theirs
                    | {"ratio": ours["both"] / theirs["both"]}
                )


def converted(model: Path, out: Path, o: Fast, tokens: int) -> dict[str, Any]:
    """Our conversion's CPU seconds; nothing is compared, since they do not compare either."""
    settings = Settings(
        o.type, calib=o.text, calib_tokens=tokens, eval_tokens=0, effort="fast", overwrite=True
    )
    report = convert(model, out, settings)
    spent = {cost.name: cost.cpu_seconds for cost in report.stages}
    return {
        "statistics": spent["route"],
        "quantize": spent["quantize"],
        "both": spent["route"] + spent["quantize"],
        "whole command": math.fsum(spent.values()),
        "bytes": out.stat().st_size,
    }


def tools(folder: Path, kind: str, o: Fast, tokens: int) -> dict[str, Any]:
    """The CPU seconds of llama.cpp's two programs on our file of type `kind`."""
    threads, exact = o.threads or os.cpu_count() or 1, folder / f"{kind}.gguf"
    imatrix, out = folder / "theirs.imatrix.gguf", folder / "theirs.gguf"
    statistics = spent(
        "llama-imatrix", "-m", exact, "-f", o.text, "-c", ROW, "--chunks", tokens // ROW, "-t", threads,
        "--no-ppl", "-o", imatrix,
    )  # fmt: skip
    quantize = spent("llama-quantize", "--imatrix", imatrix, exact, out, o.type, threads)
    both = {"statistics": statistics, "quantize": quantize, "both": statistics + quantize}
    return both | {"bytes": out.stat().st_size}


def spent(*command: object) -> float:
    """The CPU seconds that a program takes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([str(word) for word in command], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
