"""Real text in the baseline's tokens."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer
from torch import Tensor

from moequant import corpus
from moequant.checkpoint import Checkpoint
from moequant.containers.tokenizer import read_tokenizer
from moequant.errors import TokenizerError

ROW = 256
"""Tokens in a row."""


def token_rows(baseline: Checkpoint, calib: str | Path | None, tokens: int) -> Tensor:
    """i64 [rows, ROW] of `calib` as `corpus.read` takes it, None the bundled text."""
    told = read_tokenizer(baseline.path)
    bos = told.ids.get("bos") if told.add_bos else None
    rows = corpus.pack(corpus.read(calib, "calibration"), _encoder(baseline.path), ROW, tokens, 0, bos)
    config = baseline.config
    limit = int(config["max_position_embeddings"])
    return corpus.check(rows, max_length=limit, vocab_size=int(config["vocab_size"])).ids


def _encoder(folder: Path) -> Tokenizer:
    file = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception
        raise TokenizerError(f"{file}: cannot be read ({error})") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
