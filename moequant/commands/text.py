"""Rows of tokens for a model, as its own tokenizer begins them."""

from __future__ import annotations

import json

from moequant.checkpoint import Checkpoint
from moequant.containers.gguf.tokenizer.spec import read_tokenizer
from moequant.errors import TokenizerError
from moequant.text.rows import load_encoder


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
