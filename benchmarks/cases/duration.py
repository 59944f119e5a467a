"""What `convert` said it would take, and what it took."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cases.streaming import alone
from benchmarks.data import MIX
from benchmarks.harness import Row, Rows, case
from benchmarks.synthetic import Shape, build
from moequant.commands import duration as expected
from moequant.commands import pace
from moequant.commands.job import open_jobs
from moequant.commands.text import texts
from moequant.library import Settings, convert
from moequant.progress import Progress

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
        "wide Q4_K_M fast 8192",
    )


@case("Duration: what convert expects to take, and takes", Duration(("tiny Q4_K_M fast 1024",)))
def duration(o: Duration) -> Rows:
    """Conversions of models of unlike shape, each in a fresh process: a row for each stage, then one for all
    but "open", which is over when the forecast is made. `ratio` is CPU seconds taken over those expected;
    `at the pace` is the same by the speeds that are measured again between stages, so that it shows the
    counting alone. Seconds of the clock also depend on who else uses the machine."""
    with tempfile.TemporaryDirectory(prefix="moequant-duration-") as name:
        for number, asked in enumerate(o.runs):
            shape, kind, effort, tokens = asked.split()
            model = MIX if shape == "mix" else Path(name) / shape
            if not model.exists():
                build(model, SHAPES[shape])
            rows = alone(converted, model, Path(name) / f"{number}.gguf", kind, effort, int(tokens))
            named = {"model": shape, "output": f"{kind} {effort}", "tokens": int(tokens)}
            yield from (named | row for row in rows)


def converted(model: Path, out: Path, kind: str, effort: Any, tokens: int) -> list[Row]:
    """One conversion, expected whatever it costs."""
    size: dict[str, Any] = {"format": "safetensors"} if kind == "safetensors" else {"type": kind}
    settings = Settings(calib_tokens=tokens, eval_tokens=4096, effort=effort, **size)
    expected.SHORT = 0.0
    speeds, load = list[pace.Speed](), os.getloadavg()[0]

    def told(step: Progress) -> None:
        if step.cost is not None:  # between stages: nobody's seconds
            speeds.append(pace.speed())

    report = convert(model, out.with_suffix("") if kind == "safetensors" else out, settings, told)
    forecast, stages = report.forecast, report.stages[1:]
    assert forecast is not None
    jobs = open_jobs(model, settings)
    read = texts(jobs[0].model, settings, True, jobs[0].measures)
    search = pace.searches(speeds[0], effort)
    decode = expected.decoding(jobs[0].container.checkpoint, speeds[0])
    work = expected.counted(jobs, read, "route" in forecast.stages, search, decode)
    rows, both = list[Row](), 0.0
    for cost, before, after in zip(stages, speeds[:-1], speeds[1:], strict=True):
        paced = (before.seconds(work[cost.name]) + after.seconds(work[cost.name])) / 2
        rows.append(_row(cost.name, forecast.stages[cost.name], cost.cpu_seconds, paced))
        both += paced
    whole = _row("all", forecast.cpu_seconds, sum(cost.cpu_seconds for cost in stages), both)
    return [
        *rows,
        whole
        | {
            "load": load,
            "seconds expected": forecast.seconds,
            "seconds": sum(cost.seconds for cost in stages),
            "memory expected": forecast.memory_bytes,
            "peak": max(cost.peak_bytes for cost in report.stages),
        },
    ]


def _row(stage: str, told: float, cpu: float, paced: float) -> Row:
    """What is known of every stage; the rest is known of all together."""
    found: Row = {"stage": stage, "CPU expected": told, "CPU": cpu, "ratio": cpu / told}
    more = ("load", "seconds expected", "seconds", "memory expected", "peak")
    return found | {"at the pace": cpu / paced} | dict.fromkeys(more)
