"""Real text in the baseline's tokens."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from moequant.checkpoint import Checkpoint
from moequant.containers.gguf.tokenizer.spec import read_tokenizer
from moequant.text import corpus
from moequant.text.rows import load_encoder

ROW = 256
"""Tokens in a row."""


def token_rows(baseline: Checkpoint, calib: str | Path | None, tokens: int) -> Tensor:
    """i64 [rows, ROW] of `calib` as `corpus.read` takes it, None the bundled text."""
    encoder, bos = load_encoder(baseline.path), read_tokenizer(baseline.path).leading
    rows = corpus.pack(corpus.read(calib, "calibration"), encoder, ROW, tokens, 0, bos)
    shape = baseline.shape
    return corpus.check(rows, max_length=shape.context, vocab_size=shape.vocab).ids
