"""Every family, whole: what llama.cpp computes with its file is what transformers computes of its folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from moequant.commands.convert import Settings, convert
from moequant.report import Report
from moequant.rounding.coupled import UNROUNDED
from moequant.values import Role
from tests import models
from tests.clients.llama import Llama

TIES = 0.99
"""The share of positions at which logits agree: at others the router's choice may have been a tie."""


def converted(folder: Path, out: Path, text: Path, type_: str, **changes: object) -> Report:
    given = {"effort": "fast", "eval_tokens": 0, "overwrite": True} | changes
    return convert(folder, out, Settings(type_, text, 2048, text, **given))


def reference(folder: Path, ids: torch.Tensor) -> np.ndarray:
    """transformers' own logits of the folder as it is, f32 [n, vocab]."""
    model = models.reference(folder)
    with torch.inference_mode():
        return model(ids[None]).logits[0].numpy()


def released(folder: Path, family: str) -> Path:
    """A tiny checkpoint as people release it."""
    return models.as_released(models.build(folder / "model", family), family)


@pytest.mark.parametrize("family", models.CONFIGS)
def test_an_f32_file_gives_the_logits_of_transformers(tmp_path: Path, text: Path, family: str) -> None:
    """Of the checkpoint as it is released, at every position: a wrong transpose or permutation shows."""
    folder, out = released(tmp_path, family), tmp_path / "f32.gguf"
    converted(folder, out, text, "F32")
    with Llama(out, threads=1) as llama:
        ids = torch.randint(1, llama.n_vocab, (256,), generator=torch.Generator().manual_seed(0))
        difference = np.abs(llama.logits(ids.tolist()) - reference(folder, ids)).max(1)
    assert np.quantile(difference, TIES) < 5e-4


@pytest.mark.parametrize("family", models.CONFIGS)
def test_however_it_is_saved_the_file_is_the_same(tmp_path: Path, text: Path, family: str) -> None:
    """As it is released, as transformers 5 saves it, and with the experts in one tensor."""
    folders = [released(tmp_path / "released", family)]
    for fused in (False, True):
        save = {"save_original_format": not fused}
        folders.append(models.build(tmp_path / f"{fused}" / "model", family, save=save))
    files = [tmp_path / f"{number}.gguf" for number in range(len(folders))]
    for folder, file in zip(folders, files, strict=True):
        converted(folder, file, text, "F32")
    assert len({file.read_bytes() for file in files}) == 1


@pytest.mark.parametrize("family", models.CONFIGS)
def test_default_effort_rounds_every_weight_and_the_runtime_generates(
    tmp_path: Path, text: Path, family: str
) -> None:
    """Every weight of experts and attention is rounded under the Hessian of what it is fed."""
    folder, out = models.build(tmp_path / "model", family), tmp_path / "q.gguf"
    report = converted(folder, out, text, "Q4_K_M", effort="default", eval_tokens=1024)
    formats = {choice.weight: choice.format for choice in report.plan.choices}
    matrices = [weight for weight in report.checkpoint.weights if not weight.role.keeps_precision]
    whole = {weight.name for weight in matrices if formats[weight.name] in UNROUNDED}
    assert whole == set(), "a matrix stayed as it was"
    assert all(weight.site or weight.role is Role.EMBEDDING for weight in matrices)
    assert not [loss for loss in report.losses if loss.fallbacks]
    assert report.comparison is not None and 0 < report.comparison.kl_mean.value < 0.2
    with Llama(out, threads=1) as llama:
        produced = llama.generate([5, 6, 7], 4)
        assert produced and np.isfinite(llama.logits(produced)).all()
