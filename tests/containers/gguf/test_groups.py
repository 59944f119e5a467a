"""Experts that are chosen out of groups: only where the model does so, in numbers that llama.cpp takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from moequant.commands.convert import Settings, convert
from tests import models
from tests.clients.llama import Llama

FOUR = {"n_group": 4, "topk_group": 2}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("deepseek_v2", {**FOUR, "topk_method": "greedy"}),  # as V2-Lite says it: groups are ignored
        ("deepseek_v3", {"n_group": 4, "topk_group": 4}),  # llama.cpp aborts on four of four
        ("deepseek_v2", {"n_routed_experts": 1, "num_experts_per_tok": 1}),  # and on one of one expert
    ],
)
def test_groups_that_limit_nothing_are_none(
    tmp_path: Path, text: Path, family: str, changes: dict[str, object]
) -> None:
    folder, out = models.build(tmp_path / "model", family, **changes), tmp_path / "f32.gguf"
    usual = {"effort": "fast", "eval_tokens": 0, "self_check": False}
    convert(folder, out, Settings("F32", text, 1024, text, **usual))
    ids = torch.randint(1, models.VOCAB, (96,), generator=torch.Generator().manual_seed(0))
    with Llama(out, threads=1) as llama:
        found = llama.logits(ids.tolist())
    with torch.inference_mode():
        expected = models.reference(folder)(ids[None]).logits[0].numpy()
    assert np.quantile(np.abs(found - expected).max(1), 0.97) < 5e-4
