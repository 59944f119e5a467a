"""Models whose head is their embedding, where llama.cpp takes none for the other: the file has both."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from moequant.checkpoint import open_checkpoint
from moequant.commands.convert import Settings, convert
from moequant.containers.gguf.export import check, export
from moequant.families import FAMILIES
from moequant.values import Role
from tests import models
from tests.clients.llama import Llama
from tests.containers.gguf.test_rotations import text_config

UNTIED = ("dbrx",)
"""Families whose class cannot be tied."""


@pytest.mark.parametrize("family", [name for name in models.CONFIGS if name not in UNTIED])
def test_a_tied_head_is_no_reason_to_refuse(family: str) -> None:
    config = text_config(family, tie_word_embeddings=True)
    check(next(each for each in FAMILIES if each.model_type == config.model_type), config)


def test_an_embedding_is_written_as_the_head_as_well(tmp_path: Path, text: Path) -> None:
    """As merges of tied models are saved. What is made is compared with transformers, tied as it is."""
    folder = models.build(tmp_path / "model", "qwen2_moe", tie_word_embeddings=True)
    checkpoint = open_checkpoint(folder)
    made = export(checkpoint)
    assert checkpoint.tied and not made.checkpoint.tied and "is written twice" in made.warnings[0]
    assert {made.names[each.name] for each in made.weights if each.role in (Role.EMBEDDING, Role.OUTPUT)} == {
        "token_embd.weight",
        "output.weight",
    }
    out = tmp_path / "f32.gguf"
    given = {"effort": "fast", "eval_tokens": 1024}
    report = convert(folder, out, Settings("F32", text, 1024, text, **given))
    assert report.comparison is not None and report.comparison.kl_mean.value < 1e-6
    ids = torch.randint(1, models.VOCAB, (128,), generator=torch.Generator().manual_seed(0))
    with Llama(out, threads=1) as llama:
        found = llama.logits(ids.tolist())
    with torch.inference_mode():
        expected = models.reference(folder)(ids[None]).logits[0].numpy()
    assert np.quantile(np.abs(found - expected).max(1), 0.99) < 5e-4
