"""Experts that a plan leaves as they are, in a folder where others have a scheme."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moequant.checkpoint import load, open_checkpoint
from moequant.commands.convert import Settings, convert, open_job
from moequant.containers.folders import compressed_tensors
from moequant.containers.folders.container import FolderContainer
from moequant.containers.folders.plan import FolderSettings, kept_dtype, modules


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "deepseek_v4", "ernie4_5_moe"])
def test_experts_that_stay_are_all_written(tiny, tmp_path: Path, text: Path, family: str) -> None:
    """Each has a tensor of its own, whether the checkpoint stacks them or not, and no scheme."""
    model, out, plan = tiny(family), tmp_path / "out", tmp_path / "plan.json"
    checkpoint = open_checkpoint(model)
    experts = [weight for weight in checkpoint.weights if weight.is_expert and len(weight.shape) == 3]
    rounded = {weight.name for weight in experts if weight.layer == experts[-1].layer}
    every = FolderContainer(checkpoint, FolderSettings()).checkpoint.weights
    plan.write_text(json.dumps({w.name: "W4A16_G32" if w.name in rounded else kept_dtype(w) for w in every}))
    asked = Settings(format="safetensors", plan=plan, calib=text, calib_tokens=2048, effort="fast")
    convert(model, out, replace(asked, eval_tokens=0))
    assert sum(file.stat().st_size for file in out.glob("*.safetensors")) == open_job(model, asked).size
    folder = compressed_tensors.open_folder(out)
    for weight in checkpoint.weights:
        assert torch.equal(folder.load(weight), load(weight)) is (weight.name not in rounded), weight.name
    ignored = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    assert len(rounded) < len(experts)
    for weight in experts:
        for module in modules(weight):
            assert compressed_tensors.names(ignored, module) is (weight.name not in rounded)
            assert (f"{module}.weight" in folder.tensors) is (weight.name not in rounded)
