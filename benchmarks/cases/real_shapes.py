"""Layers of the size of real models."""

from __future__ import annotations

import resource
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.cases.streaming import alone
from benchmarks.harness import Rows, case
from benchmarks.synthetic import Shape, build
from moequant import Settings, convert

QWEN3_30B = Shape(2, 2048, 128, 768, 151_936, 16_384, 8, 32, 4, 128, True)
TINY = Shape(1, 256, 8, 256, 512, 2_048, correlated=True)
SHAPES = {"Qwen3-30B-A3B": QWEN3_30B, "tiny": TINY}


@dataclass(frozen=True)
class RealShapes:
    """A shape by name, with so many layers and experts (0: its own); `tokens` cross it, in `ram` bytes (0: no
    limit)."""

    shape: str = "Qwen3-30B-A3B"
    layers: int = 0
    experts: int = 0
    vocab: int = 0
    tokens: int = 0
    ram: int = 6 * 10**9
    efforts: tuple[str, ...] = ("fast", "default")


@case("Real shapes: time and memory of layers of real size", RealShapes("tiny", efforts=("default",)))
def real_shapes(o: RealShapes) -> Rows:
    """Conversion to Q4_K_M of random layers whose inputs are correlated, each effort in a fresh process,
    stage by stage: seconds, peak resident bytes, bytes read. CPU seconds are of the whole conversion."""
    given = {"layers": o.layers, "experts": o.experts, "vocab": o.vocab, "tokens": o.tokens}
    shape = replace(SHAPES[o.shape], **{name: value for name, value in given.items() if value})
    with tempfile.TemporaryDirectory(prefix="moequant-shapes-") as name:
        folder = Path(name)
        build(folder / "model", shape)
        for effort in o.efforts:
            found = alone(converted, folder / "model", folder / f"{effort}.gguf", effort, shape.tokens, o.ram)
            yield from ({"effort": effort, **row} for row in found)


def converted(model: Path, out: Path, effort: Any, tokens: int, ram: int) -> list[dict[str, Any]]:
    """The stages of a conversion, and all of it."""
    settings = Settings("Q4_K_M", calib_tokens=tokens, eval_tokens=4096, effort=effort, ram=ram or None)
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
    return [*stages, whole | {"peak": peak, "CPU seconds": used.ru_utime + used.ru_stime, "weights": weights}]
