"""Phi-3.5-MoE goes into folders alone: llama.cpp's architecture of that name is another model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from moequant.checkpoint import open_checkpoint
from moequant.commands.convert import Settings, convert
from moequant.containers.gguf.export import export
from moequant.errors import FamilyError
from moequant.forward.model import build_model
from tests import models
from tests.commands.test_convert import ids_for, reference_logits

CHANGES = {"model_type": "phimoe", "attention_bias": True, "lm_head_bias": True}


@pytest.fixture(scope="module")
def phimoe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.build(tmp_path_factory.mktemp("phimoe"), "mixtral", **CHANGES)


def test_the_weights_are_those_of_transformers(phimoe: Path) -> None:
    ids = ids_for(models.VOCAB, 64)
    with torch.inference_mode():
        found = build_model(open_checkpoint(phimoe))(ids[None]).logits[0].numpy()
    assert np.abs(found - reference_logits(phimoe, ids)).max() < 1e-4


def test_gguf_is_refused(phimoe: Path) -> None:
    with pytest.raises(FamilyError, match=r"SparseMixer.*--format safetensors"):
        export(open_checkpoint(phimoe))


def test_a_folder_computes_nearly_the_same(phimoe: Path, tmp_path: Path, text: Path) -> None:
    out = tmp_path / "folder"
    how = Settings(format="safetensors", calib=text, calib_tokens=2048, eval_tokens=0, effort="fast", bits=8)
    convert(phimoe, out, how)
    ids = ids_for(models.VOCAB, 64)
    with torch.inference_mode():
        found = build_model(open_checkpoint(out))(ids[None]).logits[0].numpy()
    wanted = reference_logits(phimoe, ids)
    assert np.median(np.abs(found - wanted)) < 0.05 * np.abs(wanted).std()
