"""gpt-oss in the layout of its release: transformers, and our reading of a release, load what is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Mxfp4Config

from moequant.check.folder import FolderSource
from moequant.checkpoint import load, open_checkpoint
from moequant.containers.folders import mxfp4
from moequant.errors import PlanError
from moequant.forward.experts import EXPERTS
from moequant.forward.model import build_model
from tests import models
from tests.containers.folders.cases import folder_of, quantized

IDS = torch.randint(1, models.VOCAB, (1, 48), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mxfp4") / "out"
    quantized(tiny("gpt_oss"), out, scheme="MXFP4A16")
    return out


def test_tensors_are_those_of_the_release(tiny, made: Path) -> None:
    before, stored = load_file(tiny("gpt_oss") / "model.safetensors"), load_file(made / "model.safetensors")
    fused = {name for name in before if name.endswith(("experts.gate_up_proj", "experts.down_proj"))}
    assert stored.keys() == (before.keys() - fused) | {n + end for n in fused for end in mxfp4.ENDINGS}
    for name in fused:
        experts, n_in, n_out = before[name].shape
        assert stored[f"{name}_blocks"].shape == (experts, n_out, n_in // 32, 16)
        assert stored[f"{name}_scales"].shape == (experts, n_out, n_in // 32)
    for name in before.keys() - fused:
        assert torch.equal(stored[name], before[name]), "what is no expert is copied"
    config = json.loads((made / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "mxfp4"


def test_transformers_computes_what_our_decoder_predicts(tiny, made: Path) -> None:
    reader, release, original = (
        mxfp4.open_folder(made),
        open_checkpoint(made),
        open_checkpoint(tiny("gpt_oss")),
    )
    as_released = {weight.name: load(weight) for weight in release.weights}
    for weight in original.weights:
        values, exact = reader.load(weight).float(), load(weight).float()
        assert torch.equal(values, as_released[weight.name].float()), weight.name
        if reader.is_quantized(weight):
            assert torch.equal(reader.load(weight.of(range(1, 3))).float(), values[1:3]), "some experts alone"
            off = (values - exact).square().sum((1, 2)) / exact.square().sum((1, 2))
            assert ((off > 0) & (off < 0.02)).all(), (weight.name, off)
    loaded = AutoModelForCausalLM.from_pretrained(
        made, dtype="auto", quantization_config=Mxfp4Config(dequantize=True), experts_implementation="eager"
    )
    loaded = torch.nn.Module.float(loaded.eval())
    ours = build_model(original, EXPERTS, reader.load)
    with torch.inference_mode():
        assert (loaded(IDS).logits - ours(IDS).logits).abs().max() < 1e-3


def test_check_names_the_stack_that_changed(tiny, made: Path, tmp_path: Path) -> None:
    stored = load_file(made / "model.safetensors")
    name = "model.layers.1.mlp.experts.gate_up_proj_blocks"
    stored[name][2, 5] ^= 1
    for file in made.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    source = FolderSource(tmp_path, open_checkpoint(tiny("gpt_oss")))
    changed = [entry.name for entry in source.entries if source.altered(entry, source.matrix(entry))]
    assert changed == ["layers.1.experts.gate", "layers.1.experts.up"]
    assert source.altered_rest() == ()


def test_attention_stays(tiny) -> None:
    with pytest.raises(PlanError, match="take its experts alone"):
        folder_of(tiny("gpt_oss"), scheme="MXFP4A16", quantize_attention=True)
