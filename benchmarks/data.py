"""The models and texts of the cases, and the options that several share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from moequant.text import bundled, corpus
from moequant.text.corpus import Rows
from moequant.text.rows import ROW, load_encoder
from tests.models import SHARED

DEMO = bundled.path("demo")
MIX = SHARED / "models" / "mix"
CALIB = SHARED / "data" / "calib.txt"
ONE_TEXT = bundled.path("calib") / "text/long/01.txt"
EVAL = SHARED / "data" / "eval.txt"
BASELINES = SHARED / "baselines" / "mix.json"


@dataclass(frozen=True)
class Beside:
    """Files of a model beside llama.cpp's: texts None are the bundled ones, `chunks` of ROW tokens judge,
    `tokens` calibrate, `baselines` is llama.cpp's figures (shared/baselines/README.md)."""

    model: Path = MIX
    calib: Path | None = CALIB
    eval: Path | None = EVAL
    baselines: Path | None = BASELINES
    chunks: int = 240
    tokens: int = 204_800

    @property
    def ids(self) -> Tensor:
        """The rows that judge."""
        return rows(self.model, self.eval, "evaluation", self.chunks).ids


TINY = {"model": DEMO, "calib": None, "eval": None, "baselines": None, "chunks": 2, "tokens": 2048}
"""`Beside` for a smoke run."""


def rows(
    model: Path, text: Path | None, split: bundled.Split = "calibration", count: int | None = None
) -> Rows:
    """The first `count` rows of a text, as llama.cpp's tools cut it; all of them when None."""
    tokens = None if count is None else count * ROW
    return corpus.pack(corpus.read(text, split), load_encoder(model), ROW, tokens)


def part(rows: Rows, first: int, count: int) -> Rows:
    """`count` of the rows from `first` on."""
    ids = rows.ids[first : first + count]
    return Rows(ids, rows.domains[first : first + count], rows.source, ids.numel())
