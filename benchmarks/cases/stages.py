"""Where a conversion's time goes."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks import measure
from benchmarks.data import DEMO
from benchmarks.harness import Rows, case
from moequant import Settings, convert, formats
from moequant.checkpoint import load
from moequant.formats import Effort
from moequant.report.summary import Report
from moequant.rounding.diagonal import relative_error
from moequant.statistics.importance import importance
from tests.formats import ggml


@dataclass(frozen=True)
class Stages:
    """A model to convert."""

    model: Path = DEMO
    type: str = "Q4_K_M"
    calib: Path | None = None
    tokens: int = 65_536
    effort: Effort = "default"


@case("Stages, and our encoders beside llama.cpp's code", Stages(tokens=1024, effort="fast"), ("ggml",))
def stages(o: Stages) -> Rows:
    """A whole conversion with its stages. Then every weight is packed twice, tensor by tensor in turn, by us
    and by `ggml_quantize_chunk` (what llama-quantize calls for every chunk of rows), on one thread, with the
    same importance, after what torch compiles was compiled."""
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(o.type, o.calib, o.tokens, eval_tokens=0, effort=o.effort)
        report = convert(o.model, Path(folder) / "out.gguf", settings)
    for cost in report.stages:
        yield {"stage": cost.name, "seconds": cost.seconds, "peak MB": cost.peak_bytes / 1e6}
    yield from beside_ggml(report)


COLUMNS = ("weights", "our CPU s", "ggml's CPU s", "error", "ggml's error")


def beside_ggml(report: Report) -> Rows:
    """Every weight packed by both, the totals by format."""
    weights = {weight.name: weight for weight in report.checkpoint.weights}
    totals: dict[str, list[float]] = defaultdict(lambda: [0.0] * len(COLUMNS))
    assert report.calibration is not None
    for choice in report.plan.choices:
        weight, fmt = weights[choice.weight], formats.get(choice.format)
        if weight.role.keeps_precision:
            continue
        values, columns = load(weight), None
        if weight.site is not None:
            columns = importance(report.calibration.inputs[weight.site.name])
            columns = columns[0] if values.ndim == 2 else columns
        pack = partial(formats.quantize, fmt, values, columns, threads=1)
        if choice.format not in totals:
            pack()  # compiles
        ours, spent = measure.cpu(pack)
        theirs, other = measure.cpu(partial(ggml.quantize, fmt, values, columns))
        errors = [relative_error(fmt, values, data, columns).mean() for data in (ours, theirs)]
        found = (weight.numel, spent, other, *(float(error) * weight.numel for error in errors))
        totals[choice.format] = [a + b for a, b in zip(totals[choice.format], found, strict=True)]
    for name, row in (
        totals | {"all": [sum(column) for column in zip(*totals.values(), strict=True)]}
    ).items():
        count, spent, other, error, reference = row
        yield {
            "format": name,
            "weights": int(count),
            "our CPU s": spent,
            "ggml's CPU s": other,
            "times as fast": other / spent,
            "error, ours / ggml's": error / reference if reference else None,
        }
