"""Experts that a plan leaves as they are, in a folder where others have a scheme."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moequant.checkpoint import load, open_checkpoint
from moequant.commands.convert import Settings, convert, open_job
from moequant.containers.folders import compressed_tensors
from moequant.containers.folders.container import FolderContainer
from moequant.containers.folders.plan import ATTENTION, FolderSettings, kept_dtype, modules
from tests import models
from tests.containers.folders.cases import folder_of, quantized


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


@pytest.mark.parametrize("family", ["qwen3_5_moe", "qwen3_vl_moe", "kimi_k25", "mistral4"])
def test_a_model_that_sees_keeps_its_eyes_and_its_names(tmp_path: Path, family: str) -> None:
    """config.json is the whole model's: loaders look for its tower, and for text where the release has it."""
    model = models.as_released(models.build(tmp_path / "model", family), family)
    checkpoint = open_checkpoint(model)
    quantized(model, tmp_path / "out", scheme="MXFP4A16", quantize_attention=True)
    source = {name: each for file in model.glob("*.safetensors") for name, each in load_file(file).items()}
    made = load_file(tmp_path / "out" / "model.safetensors")
    seen = {each.name for found in checkpoint.unread.values() for each in found}
    assert seen and all("language_model.layers" not in name for name in seen)
    rounded = {weight.name for weight in checkpoint.weights if weight.is_expert or weight.role in ATTENTION}
    for weight in checkpoint.weights:
        names = {each.name for each in weight.origin.stored}
        if weight.name not in rounded and names <= made.keys():
            assert all(torch.equal(made[name], source[name]) for name in names)
    assert all(torch.equal(made[name], source[name]) for name in seen)
    begins = {name.partition("layers.")[0] for name in source if ".layers." in name and name not in seen}
    told = {name.partition("layers.")[0] for name in made if ".layers." in name and name not in seen}
    assert told == begins and "model.layers." not in {f"{each}layers." for each in told}
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    for name in (name for name in seen if len(source[name].shape) > 1):
        inside = name.removeprefix("model.").removesuffix(".weight")  # as vLLM calls it
        assert compressed_tensors.names(ignored, inside) and compressed_tensors.names(
            ignored, f"model.{inside}"
        )


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_next", "nemotron_h"])
def test_what_predicts_is_ignored_as_a_whole(tmp_path: Path, family: str) -> None:
    """Under any name: vLLM's classes fuse its parts, and do not say of which modules."""
    model = models.as_released(models.build(tmp_path / "model", family), family)
    folder, _ = quantized(model, tmp_path / "out", scheme="W4A16_G32")
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    at = "model.layers.3" if family == "deepseek_v3" else "mtp.layers.0"
    for name in ("mlp.shared_experts.gate_up_proj", "mixer.experts.0.gate_proj", "self_attn.qkv_proj"):
        assert compressed_tensors.names(ignored, f"{at}.{name}")
    experts = [weight for weight in folder.checkpoint.weights if weight.is_expert]
    assert not any(compressed_tensors.names(ignored, module) for each in experts for module in modules(each))


def test_the_indexers_keys_stay_with_its_weights_of_heads(tiny) -> None:
    """vLLM has both in one module that nobody rounds."""
    folder = folder_of(tiny("deepseek_v32"), scheme="W4A16_G32", quantize_attention=True)
    kinds = {choice.weight: choice.format for choice in folder.plan.choices}
    assert {kinds[f"layers.{layer}.indexer.k"] for layer in range(3)} == {"BF16"}
    assert {kinds[f"layers.{layer}.indexer.q_b"] for layer in range(3)} == {"W4A16_G32"}


def test_only_the_new_scheme_is_told(tmp_path: Path) -> None:
    """Kimi-K2.5 is released with a quantization_config inside of text_config."""
    model = models.as_released(models.build(tmp_path / "model", "kimi_k25"), "kimi_k25")
    release, out = tmp_path / "release", tmp_path / "out"
    quantized(model, release, scheme="W4A16_G32")
    raw = json.loads((release / "config.json").read_text())
    raw["text_config"]["quantization_config"] = raw.pop("quantization_config")
    (release / "config.json").write_text(json.dumps(raw))
    quantized(release, out, scheme="MXFP4A16")
    told = json.loads((out / "config.json").read_text())
    assert told["quantization_config"]["format"] == "mxfp4-pack-quantized"
    assert "quantization_config" not in told["text_config"]
