"""What `convert` said it would take, and what it took."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cases.streaming import alone
from benchmarks.data import MIX
from benchmarks.harness import Rows, case
from benchmarks.synthetic import Shape, build
from moequant import Settings, convert
from moequant.commands import duration as expected

SHAPES = {
    "wide": Shape(1, 2048, 16, 768, 8_192, 0, 8, 32, 4, 128, True),
    "middle": Shape(2, 1024, 16, 512, 4_096, 0, 4, 16, 4, 64, True),
    "narrow": Shape(8, 256, 16, 256, 512, 0, 2, 4, 2, 64, True),
    "few": Shape(2, 1024, 4, 2048, 2_048, 0, 2, 8, 8, 128, True),
    "many": Shape(2, 512, 96, 256, 16_384, 0, 6, 8, 2, 64, True),
    "tiny": Shape(1, 256, 4, 256, 512, 0, 2, correlated=True),
}
"""Unlike models by name; "mix" is the trained one of the other benchmarks."""


@dataclass(frozen=True)
class Duration:
    """Each of `runs` is a shape, a preset or "safetensors", an effort and tokens of calibration text."""

    runs: tuple[str, ...] = (
        "many Q3_K_M fast 16384",
        "few safetensors default 8192",
        "mix Q4_K_M default 8192",
        "narrow IQ3_M fast 8192",
    )


@case("Duration: what convert expects to take, and takes", Duration(("tiny Q4_K_M fast 1024",)))
def duration(o: Duration) -> Rows:
    """Conversions of models of unlike shape, each in a fresh process. `ratio` is CPU seconds taken over those
    expected, without "open", which is over by then; seconds also depend on who else uses the machine."""
    with tempfile.TemporaryDirectory(prefix="moequant-duration-") as name:
        for number, asked in enumerate(o.runs):
            shape, kind, effort, tokens = asked.split()
            model = MIX if shape == "mix" else Path(name) / shape
            if not model.exists():
                build(model, SHAPES[shape])
            yield alone(converted, model, Path(name) / f"{number}.gguf", kind, effort, int(tokens))


def converted(model: Path, out: Path, kind: str, effort: Any, tokens: int) -> dict[str, Any]:
    """One conversion, expected whatever it costs."""
    size: dict[str, Any] = {"format": "safetensors"} if kind == "safetensors" else {"type": kind}
    settings = Settings(calib_tokens=tokens, eval_tokens=4096, effort=effort, **size)
    expected.SHORT = 0.0
    load = os.getloadavg()[0]
    report = convert(model, out.with_suffix("") if kind == "safetensors" else out, settings)
    told = report.forecast
    assert told is not None
    took = [cost for cost in report.stages if cost.name != "open"]
    cpu, seconds = sum(cost.cpu_seconds for cost in took), sum(cost.seconds for cost in took)
    return {
        "model": model.name,
        "output": f"{kind} {effort}",
        "tokens": tokens,
        "weights": sum(weight.numel for weight in report.checkpoint.weights),
        "load": load,
        "CPU expected": told.cpu_seconds,
        "CPU": cpu,
        "ratio": cpu / told.cpu_seconds,
        "seconds expected": told.seconds,
        "seconds": seconds,
        "memory expected": told.memory_bytes,
        "peak": max(cost.peak_bytes for cost in report.stages),
    }
