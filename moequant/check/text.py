"""Real text in the baseline's tokens."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from moequant.checkpoint import Checkpoint
from moequant.text import corpus
from moequant.text.rows import load_encoder

ROW = 256
"""Tokens in a row. A shorter context has shorter rows."""


def token_rows(baseline: Checkpoint, calib: str | Path | None, tokens: int, bos: int | None) -> Tensor:
    """i64 [rows, n] of `calib` as `corpus.read` takes it, None the bundled text."""
    encoder, shape = load_encoder(baseline.path), baseline.shape
    length = min(ROW, shape.context)
    corpus.check_budget(tokens, length, "--tokens")
    rows = corpus.pack(corpus.read(calib, "calibration"), encoder, length, tokens, 0, bos)
    return corpus.check(rows, max_length=shape.context, vocab_size=shape.vocab).ids
