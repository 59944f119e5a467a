"""GGUF files as sources: every family's way into a file is gone back, and then forth again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from moequant.checkpoint import load, open_checkpoint
from moequant.commands.convert import Settings, convert
from moequant.containers.opened import open_model
from moequant.errors import CheckpointError, MoequantError
from moequant.hub import GgufModel
from moequant.hub.fetch import headers
from moequant.report import Report
from moequant.values.ops import Exp, NegativeExp, Plus
from tests import models

INEXACT = (Plus, NegativeExp, Exp)
"""Ops that round: what they are given back is off by as much."""


def converted(model: Path | GgufModel, out: Path, text: Path, type_: str, **changes: object) -> Report:
    given = {"effort": "fast", "eval_tokens": 0, "overwrite": True} | changes
    return convert(model, out, Settings(type_, text, 2048, text, **given))


def without_weights(folder: Path) -> Path:
    """The folder's config and tokenizer alone; of its name, since files say it."""
    made = folder.parent / "config" / folder.name
    shutil.copytree(folder, made, ignore=shutil.ignore_patterns("*.safetensors*"))
    return made


@pytest.mark.parametrize("family", models.CONFIGS)
def test_a_file_of_a_file_is_the_same(tmp_path: Path, text: Path, family: str) -> None:
    folder, first, second = models.build(tmp_path / "model", family), tmp_path / "1.gguf", tmp_path / "2.gguf"
    converted(folder, first, text, "F32", self_check=False)
    source = GgufModel(first, without_weights(folder))
    report = converted(source, second, text, "F32")
    assert first.read_bytes() == second.read_bytes()
    assert report.checked is not None and "the file that was read" in report.checked
    theirs = {weight.name: weight for weight in open_model(headers(source)).weights}
    mine = open_checkpoint(folder).weights
    assert theirs.keys() == {weight.name for weight in mine}
    for weight in mine:
        other = theirs[weight.name]
        rounds = any(isinstance(op, INEXACT) for ops, _ in other.origin.pieces for op in ops)
        torch.testing.assert_close(
            load(other).float(), load(weight).float(), rtol=0, atol=1e-6 if rounds else 0, msg=weight.name
        )
