"""Where a conversion's time goes, and its quantizers beside llama.cpp's own code on the same tensors.

    python benchmarks/stages.py MODEL [--type Q4_K_M] [--calib TEXT]

First a whole conversion with its stages. Then every weight is packed twice, tensor by
tensor in turn, by moequant and by `ggml_quantize_chunk` (what llama-quantize calls for
every chunk of rows), both on one thread with the same importance. Figures are CPU
seconds of this process, so that other work on the machine counts less; encoders that
torch compiles are compiled before the clock starts, and what that took is printed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from moequant import formats
from moequant.checkpoint import load
from moequant.commands.convert import Settings, convert
from moequant.report.summary import Report
from moequant.rounding.diagonal import relative_error
from moequant.statistics.importance import importance
from tests.formats import ggml


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--type", default="Q4_K_M")
    parser.add_argument("--calib")
    parser.add_argument("--tokens", type=int, default=65_536)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(arguments.type, arguments.calib, arguments.tokens, eval_tokens=0)
        report = convert(arguments.model, Path(folder) / "out.gguf", settings)
    for cost in report.stages:
        print(f"{cost.name:10} {cost.seconds:8.2f} s {cost.peak_bytes / 1e6:8.0f} MB")
    beside_ggml(report)


def beside_ggml(report: Report) -> None:
    """Every weight packed by both, the totals by format."""
    weights = {weight.name: weight for weight in report.checkpoint.weights}
    totals: dict[str, list[float]] = defaultdict(lambda: [0.0] * 5)
    compiling = 0.0
    assert report.calibration is not None
    for choice in report.plan.choices:
        weight, fmt = weights[choice.weight], formats.get(choice.format)
        if weight.role.keeps_precision:
            continue
        values = load(weight)
        columns = None
        if weight.input is not None:
            columns = importance(report.calibration.inputs[weight.input])
            columns = columns[0] if values.ndim == 2 else columns
        if choice.format not in totals:
            start = time.process_time()
            formats.quantize(fmt, values, columns, threads=1)
            compiling += time.process_time() - start
        start = time.process_time()
        ours = formats.quantize(fmt, values, columns, threads=1)
        between = time.process_time()
        theirs = ggml.quantize(fmt, values, columns)
        end = time.process_time()
        row = totals[choice.format]
        row[0] += weight.numel
        row[1] += between - start
        row[2] += end - between
        row[3] += float(relative_error(fmt, values, ours, columns).mean()) * weight.numel
        row[4] += float(relative_error(fmt, values, theirs, columns).mean()) * weight.numel
    print("\n| format | weights | moequant, CPU s | ggml, CPU s | times as fast | error, ours / ggml's |")
    print("|---|---|---|---|---|---|")
    for name, (count, ours, theirs, error, reference) in totals.items():
        ratio = error / reference if reference else 1.0
        print(f"| {name} | {count:,.0f} | {ours:.2f} | {theirs:.2f} | {theirs / ours:.2f} | {ratio:.3f} |")
    ours, theirs = (sum(row[index] for row in totals.values()) for index in (1, 2))
    print(f"| all | | {ours:.2f} | {theirs:.2f} | {theirs / ours:.2f} | |")
    print(f"\nfirst use of every format, compilation included: {compiling:.1f} CPU s")


if __name__ == "__main__":
    main()
