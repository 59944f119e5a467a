"""Which objective should the quantizers minimise?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.data import CALIB, DEMO, EVAL, MIX, part, rows
from benchmarks.engine import Judge, rounded
from benchmarks.harness import Row, Rows, case
from benchmarks.llama import as_file, preset_types
from moequant import formats
from moequant.checkpoint import load
from moequant.formats import Format
from moequant.statistics.calibrate import calibrate
from moequant.statistics.importance import Gating, importance
from moequant.values import Calibration, Weight
from tests.formats import ggml

Pack = Callable[[Format, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Objective:
    """`calibrate` rows of `text` calibrate; `rows` rows, evenly spread over `score`, are scored: documents
    of one kind stand together, and ratios differ more between kinds than within."""

    model: Path = MIX
    text: Path | None = CALIB
    score: Path | None = EVAL
    presets: tuple[str, ...] = ("IQ2_XXS", "Q2_K_S", "Q3_K_S", "IQ3_S", "Q4_K_S", "IQ4_XS", "Q5_K_S")
    calibrate: int = 400
    rows: int = 80


@case(
    "Which objective the quantizers should minimise",
    Objective(DEMO, None, None, ("Q3_K_S",), 4, 2),
    ("ggml",),
)
def objective(o: Objective) -> Rows:
    """KL divergence in our engine at llama.cpp's own types: ggml's encoder; ours with the importance times
    (c·mean(x²) + x²)^(p/2) for p = 0, 0.5 and 1, the same importance as ggml; and our defaults (each format's
    own p, tokens weighted by the square of the router's weight). ± is paired by row."""
    exported = as_file(o.model)
    checkpoint = exported.checkpoint
    stats = calibrate(checkpoint, part(rows(o.model, o.text), 0, o.calibrate))
    judge = Judge.of(checkpoint, spread(rows(o.model, o.score, "evaluation").ids, o.rows))
    for preset in o.presets:
        types = preset_types(exported, preset)

        def kl(pack: Pack, gating: Gating = "none", types: dict[str, str] = types) -> Tensor:
            return judge.kl(rounded(types, encoder(stats, pack, gating))).mean(1)

        theirs, ours = kl(ggml_pack), kl(formats.quantize, "gate2")
        row: Row = {"types of": preset, "ggml": float(theirs.mean())}
        for p in (0.0, 0.5, 1.0):
            found = kl(lambda fmt, x, w, p=p: formats.quantize(fmt, x, w, magnitude=p))
            row[f"p = {p:g}"] = float(found.mean())
        ratio, error = measure.ratio(ours, theirs)
        yield row | {"default": float(ours.mean()), "default / ggml": ratio, "±": error}


def encoder(stats: Calibration, pack: Pack, gating: Gating) -> Callable[[Weight, str], Tensor]:
    """Weights packed under that importance, and decoded."""

    def encode(weight: Weight, name: str) -> Tensor:
        columns, fmt = None, formats.get(name)
        if weight.site is not None:
            columns = importance(stats.inputs[weight.site.name], gating)
            columns = columns if len(weight.shape) == 3 else columns[0]
        return formats.dequantize(fmt, pack(fmt, load(weight), columns))

    return encode


def ggml_pack(fmt: Format, values: Tensor, weights: Tensor | None) -> Tensor:
    """ggml's encoder; it refuses some formats without importance."""
    needed = weights is None and ggml.needs_importance(fmt)
    return ggml.quantize(fmt, values, torch.ones(values.shape[-1]) if needed else weights)


def spread(ids: Tensor, count: int) -> Tensor:
    """`count` of the rows ids [n, 512], evenly spaced; all of them where there are no more."""
    return ids[torch.linspace(0, len(ids) - 1, min(count, len(ids))).long()]
