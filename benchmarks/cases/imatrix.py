"""Our imatrix in llama.cpp's own quantizer."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks import llama, measure
from benchmarks.data import CALIB, ONE_TEXT, TINY, Beside, rows
from benchmarks.harness import Row, Rows, case
from moequant.containers.gguf import imatrix as files
from moequant.statistics.calibrate import calibrate
from moequant.values import Calibration


@dataclass(frozen=True)
class Imatrix(Beside):
    """llama-imatrix reads a text file, so the bundled text will not do."""

    calib: Path = CALIB
    types: tuple[str, ...] = ("Q2_K", "IQ3_S", "Q4_K_M")
    chunks: int = 80


@case(
    "Our imatrix in llama.cpp's own quantizer",
    Imatrix(**TINY | {"calib": ONE_TEXT}),
    ("llama.cpp", "llama-quantize", "llama-imatrix"),
)
def imatrix(o: Imatrix) -> Rows:
    """First how far our sums lie from llama-imatrix's, tensor by tensor. Then every type quantized by
    llama-quantize with their file, with ours in their definition (gating "none") and with our importance
    ("gate2"): mean KL divergence in llama.cpp against the F32 file. ± is paired by token."""
    exported = llama.as_file(o.model)
    ours = calibrate(exported.checkpoint, rows(o.model, o.calib, count=o.tokens // 512))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tools = llama.Tools(llama.exact_file(o.model, folder), folder)
        made = {"theirs": tools.imatrix(o.calib, o.tokens // 512)}
        yield from agreement(ours, files.read(made["theirs"], exported))
        judge = llama.Judge.of(tools.exact, o.ids)
        for gating in ("none", "gate2"):
            made[gating] = folder / f"{gating}.gguf"
            files.write(made[gating], exported, ours, gating)
        for kind in o.types:
            kl = {label: judge.scores(tools.quantized(kind, file)).kl for label, file in made.items()}
            row: Row = {"type": kind, "theirs": float(kl["theirs"].mean())}
            for label in ("none", "gate2"):
                ratio, error = measure.ratio(kl[label], kl["theirs"])
                row |= {label: float(kl[label].mean()), f"{label} / theirs": ratio, f"± {label}": error}
            yield row


def agreement(ours: Calibration, theirs: Calibration) -> Rows:
    """One row a weight input: the worst expert's difference in tokens and in mean squares."""
    for name, other in theirs.inputs.items():
        if not other.tokens.any():
            continue
        mine = ours.inputs[name]
        seen = (other.tokens > 0) & (mine.tokens > 0)
        one, two = (s.moment[seen] / s.tokens[seen, None] for s in (mine, other))
        tokens = (mine.tokens - other.tokens).abs() / other.tokens.clamp(min=1)
        yield {
            "input": name,
            "tokens": float(tokens.max()),
            "mean squares, worst expert": float(((one - two).abs().sum(1) / two.sum(1)).max()),
            "worst single column": float(((one - two).abs() / two).max()),
        }
