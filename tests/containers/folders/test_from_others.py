"""Folders that are made of folders of other tools: what is rounded, what stays, and what the config says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from moequant.checkpoint import load, open_checkpoint
from moequant.containers.folders import compressed_tensors
from tests.check.test_folders import CASES
from tests.containers.folders.cases import quantized
from tests.evaluate import released

NAMES = (
    "FP8 of DeepSeek",
    "NVFP4 of ModelOpt",
    "GPTQ by activation order",
    "AutoRound",
    "AWQ",
    "fp6 of Quark",
)


@pytest.mark.parametrize("name", [*NAMES, "integers of llm-compressor"])
def test_a_folder_of_another_tool_becomes_one_of_ours(tiny, tmp_path: Path, name: str) -> None:
    """Experts in a new scheme, everything else as numbers; no word of the old scheme is left."""
    form, config, *_ = CASES[name]
    model, theirs, out = tiny("qwen3_moe", hidden_size=128), tmp_path / "theirs", tmp_path / "out"
    released.release(model, theirs, form, config)
    original, checkpoint = open_checkpoint(model), open_checkpoint(theirs)
    quantized(theirs, out, scheme="W8A16_G32")
    found = compressed_tensors.open_folder(out)
    for weight, exact in zip(checkpoint.weights, original.weights, strict=True):
        ours, was, meant = (each.float() for each in (found.load(weight), load(weight), load(exact)))
        assert ((ours - was).square().sum() / was.square().sum()) < (1e-4 if weight.is_expert else 1e-5)
        assert ((ours - meant).square().sum() / meant.square().sum()) < 0.02, weight.name
    told = json.loads((out / "config.json").read_text())["quantization_config"]
    assert {group["weights"]["num_bits"] for group in told["config_groups"].values()} == {8}
    assert {path.name for path in out.glob("*.json")} <= {
        "config.json", "moequant.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
    }  # fmt: skip
    suffixes = {name.rpartition(".")[2] for name in load_file(out / "model.safetensors")}
    assert suffixes == {"weight", "weight_packed", "weight_scale", "weight_shape"}
