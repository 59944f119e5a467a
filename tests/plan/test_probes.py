"""Probes that cross the layers side by side score what the changed models, built whole, score."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moequant.checkpoint import Checkpoint, load, open_checkpoint
from moequant.evaluate import score_row
from moequant.forward.experts import EXPERTS
from moequant.forward.model import build_model
from moequant.forward.resources import Resources
from moequant.plan.distortion import distorted
from moequant.plan.probes import divergences
from moequant.progress import Progress, listening
from moequant.values import Weight
from tests import models


def off(weight: Weight, error: float) -> Tensor:
    return distorted(load(weight), error, None)


def whole(checkpoint: Checkpoint, ids: Tensor, version: Mapping[str, float]) -> float:
    def provider(weight: Weight) -> Tensor:
        return off(weight, version[weight.name]) if weight.name in version else load(weight)

    base, changed = build_model(checkpoint, EXPERTS), build_model(checkpoint, EXPERTS, provider)
    with torch.inference_mode():
        logits = [(base(row[None]).logits[0], changed(row[None]).logits[0], row) for row in ids]
    return float(torch.cat([score_row(*each).kl for each in logits]).mean())


@pytest.mark.parametrize("tied", [False, True])
def test_versions_score_what_whole_models_do(tmp_path: Path, tied: bool) -> None:
    folder = models.build(tmp_path / "model", "qwen3_moe", tie_word_embeddings=tied)
    checkpoint = open_checkpoint(folder)
    matrices = {weight.name: 0.01 for weight in checkpoint.weights if not weight.role.keeps_precision}
    one = ("embedding", "layers.0.experts.up", "layers.1.attn_q", "layers.1.experts.down")
    versions = [{name: 0.01} for name in (*one, *(() if tied else ("head",)))]
    versions += [{"layers.0.attn_out": 0.01, "layers.1.experts.gate": 0.01}, matrices]
    ids = torch.randint(5, models.VOCAB, (2, 32), generator=torch.Generator().manual_seed(0))
    steps = list[Progress]()
    with listening(steps.append):
        found = divergences(checkpoint, ids, versions, off, Resources(threads=2))
    crossed = [(step.done, step.total) for step in steps if step.stage == "probe"]
    assert crossed == [(0, 12), (5, 12), (12, 12)], "the model, and every version from where it changes"
    assert found == pytest.approx([whole(checkpoint, ids, each) for each in versions], rel=1e-3)
    assert min(found) > 0
    assert divergences(checkpoint, ids, versions, off, Resources(ram=0, threads=1)) == found
