"""Rows of tokens for a model, as its own tokenizer begins them."""

from __future__ import annotations

import json
from dataclasses import dataclass

from moequant.checkpoint import Checkpoint
from moequant.commands.settings import Settings
from moequant.containers.gguf.tokenizer.spec import read_tokenizer
from moequant.errors import TokenizerError
from moequant.plan.measure import Probing
from moequant.text import corpus
from moequant.text.corpus import Rows
from moequant.text.rows import calibration_rows, load_encoder, probed_rows, token_rows


def leading(checkpoint: Checkpoint) -> int | None:
    """The token that every row starts with, None when rows start with text.

    As llama.cpp does it; of a tokenizer that GGUF cannot express, as its tokenizer_config.json says.
    """
    try:
        return read_tokenizer(checkpoint.path).leading
    except TokenizerError:
        encoder = load_encoder(checkpoint.path)
    try:
        told = json.loads((checkpoint.path / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    token = told.get("bos_token") if isinstance(told, dict) and told.get("add_bos_token") else None
    text = token.get("content") if isinstance(token, dict) else token
    return encoder.token_to_id(text) if isinstance(text, str) else None


@dataclass(frozen=True, slots=True)
class Texts:
    """Rows to calibrate on, to probe the plan with and to evaluate on; None where not needed."""

    calibration: Rows | None
    probes: Rows | None
    evaluation: Rows | None


def texts(checkpoint: Checkpoint, settings: Settings, calibrates: bool, measures: bool) -> Texts:
    """The rows that a conversion needs; probes and calibration share no row. CorpusError for a text that
    cannot be read."""
    bos, calib, probes, evaluation = leading(checkpoint), None, None, None
    if calibrates:
        documents = corpus.read(settings.calib, "calibration")
        if measures:
            calib, probes = probed_rows(
                checkpoint, documents, settings.calib_tokens, settings.seed, bos, Probing().rows
            )
        else:
            calib = calibration_rows(checkpoint, documents, settings.calib_tokens, settings.seed, bos)
    if settings.eval_tokens:
        documents = corpus.read(settings.eval, "evaluation")
        evaluation = token_rows(checkpoint, documents, settings.eval_tokens, settings.seed, bos)
    return Texts(calib, probes, evaluation)
