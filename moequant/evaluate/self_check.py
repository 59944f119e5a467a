"""The config is proven, not believed: what transformers makes of the untouched folder, beside what we make
of it.

moequant reads config.json, names and layouts with code of its own, and its comparison before and after runs
both sides under that one reading. So a misread rotary base would cancel out. Here the other side is
transformers' `from_pretrained` on the folder as it is. Logits of a few tokens must be equal.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor

from moequant.checkpoint import Checkpoint, load
from moequant.errors import VerifyError, one_line
from moequant.forward.causal import whole_class
from moequant.forward.memory import resident_bytes, usable_bytes
from moequant.forward.model import Provider, build_model

TOKENS = 96
"""Tokens of a row: past most windows of tiny models, and a second's work for large ones."""

ROWS = 2

LIMIT = 1e-3
"""Largest difference of a logit, in units of the largest logit where that is above 1."""

QUANTILE = 0.75
"""Of the tokens, so many must be within the limit: a router near a tie sends a few elsewhere."""


@dataclass(frozen=True, slots=True)
class SelfCheck:
    """What was found: the largest difference of a logit over the tokens up to QUANTILE, `source` for our
    reading of the folder, `decoded` for what was written where that keeps every number. `skipped` says
    why nothing was."""

    source: float | None = None
    decoded: float | None = None
    skipped: str | None = None

    @property
    def note(self) -> str:
        """One sentence for the report."""
        if self.skipped is not None:
            return f"not held against transformers: {self.skipped}"
        return (
            f"held against transformers on the untouched folder: logits differ by {self.source:.1g} at most"
        )


def self_check(checkpoint: Checkpoint, written: Provider | None, available: int | None = None) -> SelfCheck:
    """Compare logits of random tokens: transformers on the folder, our reading of it, and what was written.

    `written` are the decoded weights of an output that keeps every number, None for one that rounds.
    `available` bytes of memory may be used, None: all that are free. VerifyError when the logits differ.
    """
    needed = resident_bytes(checkpoint)
    free = usable_bytes(available)
    if free is not None and needed > free:
        return SelfCheck(skipped=f"{needed / 1e9:.1f} GB are needed for the whole model in float32")
    length = min(TOKENS, checkpoint.shape.context)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, checkpoint.shape.vocab, (ROWS, length), generator=generator)
    try:
        with _quiet():
            theirs = _reference(checkpoint, ids)
    except Exception as error:  # transformers and its quantizers raise what they like
        return SelfCheck(skipped=f"transformers does not run it here ({one_line(error, 160)})")
    source = _distance(theirs, _ours(checkpoint, load, ids))
    if not source <= LIMIT:
        raise VerifyError(
            f"{checkpoint.path}: transformers computes something else of this folder than moequant (logits "
            f"differ by {source:.2g}, at most {LIMIT:g} was expected); nothing was written, please report it "
            "(--no-self-check writes it all the same)"
        )
    decoded = None if written is None else _distance(theirs, _ours(checkpoint, written, ids))
    if decoded is not None and not decoded <= LIMIT:
        raise VerifyError(
            f"{checkpoint.path}: what was written computes something else (logits differ by {decoded:.2g}, "
            f"at most {LIMIT:g} was expected); nothing was kept, please report it"
        )
    return SelfCheck(source, decoded)


def _reference(checkpoint: Checkpoint, ids: Tensor) -> Tensor:
    """Logits [rows, n, vocab] of transformers' own loading of the folder."""
    config = transformers.AutoConfig.from_pretrained(
        checkpoint.path, trust_remote_code=False, local_files_only=True
    )
    model = whole_class(config).from_pretrained(
        checkpoint.path, dtype=torch.float32, trust_remote_code=False, local_files_only=True
    )
    return _logits(model, ids)


def _ours(checkpoint: Checkpoint, provider: Provider, ids: Tensor) -> Tensor:
    return _logits(build_model(checkpoint, provider=provider), ids)


def _logits(model: torch.nn.Module, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(input_ids=ids, use_cache=False).logits.float()
    del model
    gc.collect()  # models hold cycles, and the next one needs the room
    return found


def _distance(theirs: Tensor, ours: Tensor) -> float:
    """Largest difference of a logit of each token, its quantile over the tokens; infinite for what is no
    number."""
    scale = max(1.0, float(theirs.abs().max()))
    off = (theirs - ours).abs().amax(-1).flatten() / scale
    return float(torch.nan_to_num(off, nan=torch.inf).quantile(QUANTILE))


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers' bars and warnings are about its loading, not about the conversion."""
    logger = logging.getLogger("transformers")
    before, bars = logger.level, transformers.utils.logging.is_progress_bar_enabled()
    logger.setLevel(logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(before)
        if bars:
            transformers.utils.logging.enable_progress_bar()
