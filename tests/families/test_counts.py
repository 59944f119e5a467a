"""Numbers of experts that nobody chose for their divisors: of pruned models, and where all are chosen."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moequant.checkpoint import open_checkpoint
from moequant.commands.convert import Settings, convert
from moequant.errors import CheckpointError, FamilyError
from tests import models
from tests.clients.llama import Llama

TIES = 0.95
"""The share of positions at which logits agree: at others the router's choice may have been a tie."""

NARROW = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 64, "moe_intermediate_size": 32}


@pytest.mark.parametrize(("count", "used"), [(103, 8), (154, 8), (6, 6)])
def test_any_number_of_experts_converts(tmp_path: Path, text: Path, count: int, used: int) -> None:
    """Also where one of them is never chosen: what it is fed is then taken to be its layer's."""
    folder = models.build(
        tmp_path / "model", "qwen3_moe", **NARROW, num_experts=count, num_experts_per_tok=used
    )
    if used < count:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        tensors["model.layers.1.mlp.gate.weight"][5] = 0  # its logit is that of a middling expert
        save_file(tensors, file, {"format": "pt"})
    out, usual = tmp_path / "out.gguf", {"effort": "fast", "eval_tokens": 0, "self_check": False}
    report = convert(folder, out, Settings("Q8_0", text, 1024, text, **usual))
    assert report.calibration is not None
    seen = report.calibration.routes[1].tokens
    assert len(seen) == count and (seen[5] == 0) == (used < count)
    convert(folder, out, Settings("F32", text, 1024, text, **usual, overwrite=True))
    with Llama(out, threads=1) as llama:
        ids = torch.randint(1, llama.n_vocab, (48,), generator=torch.Generator().manual_seed(0))
        found = llama.logits(ids.tolist())
    with torch.inference_mode():
        expected = models.reference(folder)(ids[None]).logits[0].numpy()
    assert np.quantile(np.abs(found - expected).max(1), TIES) < 5e-4


def test_a_single_expert_stands_in_no_group(tmp_path: Path, text: Path) -> None:
    """llama.cpp aborts where there are as many groups as experts."""
    one = {"n_routed_experts": 1, "num_experts_per_tok": 1}
    folder, out = models.build(tmp_path / "model", "deepseek_v2", **one), tmp_path / "out.gguf"
    usual = {"effort": "fast", "eval_tokens": 0, "self_check": False}
    convert(folder, out, Settings("F32", text, 1024, text, **usual))
    ids = torch.randint(1, models.VOCAB, (48,), generator=torch.Generator().manual_seed(0))
    with Llama(out, threads=1) as llama:
        found = llama.logits(ids.tolist())
    with torch.inference_mode():
        expected = models.reference(folder)(ids[None]).logits[0].numpy()
    assert np.abs(found - expected).max() < 5e-4


@pytest.fixture
def without_shared(tmp_path: Path) -> Callable[[str], Path]:
    """A tiny model that has no shared experts: of them transformers saves matrices without a number."""

    def get(family: str) -> Path:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")
            folder = models.build(tmp_path / family / "model", family, n_shared_experts=0)
        stored = load_file(folder / "model.safetensors")
        assert {each.numel() for name, each in stored.items() if "shared_experts" in name} == {0}
        return folder

    return get


@pytest.mark.parametrize("family", ["glm4_moe", "deepseek_v3"])
def test_no_shared_experts_are_no_weights(without_shared, tmp_path: Path, text: Path, family: str) -> None:
    """llama.cpp does not load one of the two, and computes something else of the other."""
    folder, usual = without_shared(family), {"effort": "fast", "eval_tokens": 0}
    with pytest.raises(FamilyError, match=r"n_shared_experts = 0: llama\.cpp's .* always computes shared"):
        convert(folder, tmp_path / "out.gguf", Settings("F32", text, 1024, text, **usual))
    integers = Settings(None, text, 1024, text, format="safetensors", bits=8, group_size=32, **usual)
    report = convert(folder, tmp_path / "folder", integers)
    assert report.checked is not None and "logits differ by" in report.checked
    for made in (folder, tmp_path / "folder"):
        assert not any("shared" in weight.name for weight in open_checkpoint(made).weights)


@pytest.mark.parametrize("key", ["n_shared_experts", "moe_shared_expert_intermediate_size"])
def test_where_a_width_is_said_no_number_of_shared_experts_counts(tmp_path: Path, key: str) -> None:
    """Nemotron-H's class has one all the same; of width 0 it takes that of dense blocks."""
    folder = models.build(tmp_path / "model", "nemotron_h", **{key: 0}, intermediate_size=96)
    if key == "n_shared_experts":
        found = {each.shape for each in open_checkpoint(folder).weights if each.name.endswith("shared.up")}
        assert found == {(160, 256)}
        return
    with pytest.raises(FamilyError, match=f"{key} = 0: no shared experts, but there is tensor .*shared_expe"):
        open_checkpoint(folder)


def test_queries_that_are_missing_are_asked_for_by_a_key(tmp_path: Path) -> None:
    """transformers takes those of Kimi-K2.5 without a latent for its eye's, and saves none."""
    folder = models.build(tmp_path / "model", "kimi_k25", q_lora_rank=None)
    with pytest.raises(CheckpointError, match=r"q_proj\.weight\), which config key q_lora_rank = None asks"):
        open_checkpoint(folder)


def test_mistrals_own_format_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"params\.json and no config\.json.*as transformers saves"):
        open_checkpoint(tmp_path)
