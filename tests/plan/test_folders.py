"""Folders within a budget of bytes: a scheme a layer, targets that name all of it, and no byte too many."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moequant.checkpoint import load, open_checkpoint
from moequant.commands.convert import Settings, convert, open_job
from moequant.containers.folders import compressed_tensors
from moequant.containers.folders.container import FolderContainer
from moequant.containers.folders.plan import KEPT, FolderSettings
from moequant.containers.folders.schemes import PRESETS
from moequant.containers.gguf.sizes import Budget
from moequant.errors import CheckpointError, FamilyError, PlanError
from moequant.plan import from_json, to_json
from moequant.plan.folders import FolderMenu, bounds, budget_plan
from moequant.values import Plan
from tests.containers.folders.cases import own_decoder


def sizes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_a_measured_folder_fits_and_is_read(tiny, tmp_path: Path, text: Path, family: str) -> None:
    model, out = tiny(family), tmp_path / "out"
    checkpoint = open_checkpoint(model)
    budget = round(0.45 * checkpoint.source_bytes)
    settings = Settings(
        format="safetensors", size=str(budget), calib=text, calib_tokens=1024, eval_tokens=0, gpu=8.6
    )
    report = convert(model, out, settings)
    assert 0.8 * budget < sizes(out) <= budget
    kinds = {choice.weight: choice.format for choice in report.plan.choices}
    used = set(kinds.values()) - set(KEPT)
    assert used <= set("W4A16_G32 W4A16 W8A16 FP8_BLOCK FP8_DYNAMIC NVFP4A16".split()) and len(used) > 1
    assert report.plan.kl is not None and report.plan.kl > 0
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    theirs, ours = compressed_tensors.open_folder(out), own_decoder(out)
    for weight in checkpoint.weights:
        assert torch.equal(theirs.load(weight), ours.load(weight))
        if kinds[weight.name] in KEPT:
            assert torch.equal(theirs.load(weight), load(weight))
    for layer in range(checkpoint.n_layers):
        assert len({kinds[w.name] for w in checkpoint.weights if w.layer == layer and w.is_expert}) <= 1
    named = [target for group in config["config_groups"].values() for target in group["targets"]]
    stored = {name.rpartition(".")[0] for name in theirs.tensors if name.endswith("weight_scale")}
    for module in stored:  # one target or more for each, and none for what stays as it is
        assert any(t == module or (t[:3] == "re:" and re.match(t[3:], module)) for t in named), module
        assert module not in config["ignore"]


def test_vllm_finds_experts_by_its_own_names(tiny) -> None:
    """As it asks: "gate_proj" of the first expert, whatever the family calls it."""
    checkpoint = open_checkpoint(tiny("mixtral"))
    settings = FolderSettings()
    folder = FolderContainer(checkpoint, settings)
    menu = FolderMenu.of(checkpoint, settings)
    low, high = (folder.plan.bytes, checkpoint.source_bytes)
    plan = budget_plan(menu, Budget.of_size(str(int(low + 0.2 * (high - low)))), folder.size)
    from moequant.containers.folders.write import quantization

    config = quantization(checkpoint, plan, settings)
    kinds = {choice.weight: choice.format for choice in plan.choices}
    for layer in range(2):
        found = compressed_tensors.group_of(
            config, f"model.layers.{layer}.block_sparse_moe.experts.0.gate_proj"
        )
        assert found is compressed_tensors.group_of(
            config, f"model.layers.{layer}.block_sparse_moe.experts.3.w2"
        )
        assert kinds[f"layers.{layer}.experts.gate"] == kinds[f"layers.{layer}.experts.down"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"size": "1K"}, "the smallest folder of .* has .* bytes of weights; ask for more"),
        ({"size": "1G", "schemes": "W4A16,W4"}, "--schemes W4: no such scheme; there are W2A16"),
        ({"size": "1G", "schemes": "FP8_BLOCK", "gpu": 7.5}, "--gpu 7.5: none of FP8_BLOCK runs below"),
        ({"size": "1G", "scheme": "W4A16"}, "--scheme: --size chooses schemes itself"),
        ({"schemes": "W4A16"}, "--schemes is for a folder with --size"),
        ({"plan": Path("p.json"), "size": "1G"}, "--size: --plan chooses schemes itself"),
        ({"plan": Path("p.json"), "tp": 2}, "p.json: cannot be read"),
        ({"size": "1G", "schemes": "MXFP4"}, "--schemes MXFP4: rounds its inputs.* MXFP4A16 has the same"),
        ({"size": "1G", "format": "gptq"}, "--size does not go with --format gptq"),
        ({"size": "1G", "format": "awq"}, "--size does not go with --format awq"),
        ({"bits": 8, "format": "awq"}, "--format awq holds W4A16, not W8A16"),
        ({"scheme": "W4A15", "format": "safetensors"}, "--scheme W4A15: no such scheme"),
        ({"size": "1G", "tp": 3}, "--tp 3 does not divide"),
        ({"size": "1G", "tp": 8}, "--tp 8 does not divide 4 heads, or their 2 of keys and values"),
        ({"scheme": "FP8_DYNAMIC", "tp": 8}, "--tp 8 does not divide 4 heads"),
        ({"size": "1G", "schemes": "W4A16,"}, "--schemes 'W4A16,': names with a comma between were expected"),
        (
            {"size": "1G", "schemes": "W4A16_G33"},
            "--schemes W4A16_G33: no such scheme; W4A16 has groups of 32",
        ),
    ],
)
def test_what_cannot_be(tiny, changes: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        open_job(tiny("qwen3_moe"), Settings(**({"format": "safetensors"} | changes)))


def test_more_bytes_expect_less_divergence(tiny) -> None:
    checkpoint = open_checkpoint(tiny("qwen3_moe"))
    folder = FolderContainer(checkpoint, FolderSettings())
    menu = FolderMenu.of(checkpoint, FolderSettings())
    low, high = folder.size(folder.plan), checkpoint.source_bytes
    sizes = [round(low + share * (high - low)) for share in (0.0, 0.2, 0.5, 1.0)]
    found = [budget_plan(menu, Budget.of_size(str(size)), folder.size).kl for size in sizes]
    assert None not in found and sorted(found, reverse=True) == found and found[0] > found[-1]


def test_a_byte_less_than_everything_is_planned_at_once(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Headers are not among the bytes that are shared out: room for them does not bring the same plan again,
    once for each of its bytes."""
    checkpoint = open_checkpoint(tiny("qwen3_moe"))
    folder = FolderContainer(checkpoint, FolderSettings())
    menu = FolderMenu.of(folder.checkpoint, FolderSettings())
    _, high = bounds(menu, folder.size, menu.prior(folder.checkpoint.weights, 2))
    asked: list[int] = []

    def size(plan: Plan) -> int:
        asked.append(folder.size(plan))
        return asked[-1]

    budget = Budget.of_size(str(high - 1))
    assert folder.size(budget_plan(menu, budget, size)) == asked[-1] < high
    assert len(asked) < 10


@pytest.mark.parametrize("scheme", PRESETS)
def test_gpt_oss_is_refused_by_the_name_that_it_lacks(tiny, scheme: str) -> None:
    alone = [] if scheme == "MXFP4A16" else [{"scheme": scheme}]
    for asked in (*alone, {"size": "1G", "schemes": scheme}):
        with pytest.raises(FamilyError, match="no name for a single expert") as found:
            open_job(tiny("gpt_oss"), Settings(format="safetensors", **asked))
        assert "\n" not in str(found.value)


def test_an_expert_with_nan_is_named(tiny, tmp_path: Path, text: Path) -> None:
    model = Path(shutil.copytree(tiny("qwen3_moe"), tmp_path / "model"))
    weight = next(w for w in open_checkpoint(model).weights if w.name == "layers.1.experts.up")
    with (model / "model.safetensors").open("r+b") as file:
        file.seek(weight.origin.stored[5].parts[""].begin)
        file.write(b"\xc0\x7f")
    asked = Settings(format="safetensors", size="3M", calib=text, eval_tokens=0, self_check=False)
    with pytest.raises(CheckpointError, match="NaN") as found:
        convert(model, tmp_path / "out", replace(asked, calib_tokens=2048))
    assert "\n" not in str(found.value) and "experts.5.up" in str(found.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_plan_is_written_and_read(tiny, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny("qwen3_moe"))
    folder = FolderContainer(checkpoint, FolderSettings())
    menu = FolderMenu.of(checkpoint, FolderSettings())
    half = (folder.size(folder.plan) + checkpoint.source_bytes) // 2
    plan = budget_plan(menu, Budget.of_size(str(half)), folder.size)
    (tmp_path / "plan.json").write_text(to_json(plan))
    job = open_job(tiny("qwen3_moe"), Settings(format="safetensors", plan=tmp_path / "plan.json"))
    assert job.plan == plan and not job.measures

    kinds = {choice.weight: choice.format for choice in plan.choices}
    whole = dict.fromkeys((w.name for w in checkpoint.weights if w.is_expert), "w3a16")
    edited = from_json(json.dumps(kinds | whole), checkpoint.weights, "p", made=menu.given)
    assert {choice.format for choice in edited.choices if choice.weight in whole} == {"W3A16"}
    for change, message in (
        ({"layers.1.experts.down": "W8A8"}, r"p: layers.1.experts.gate is .*down is W8A8; vLLM reads one"),
        ({"layers.0.experts.up": "Q4_K"}, "p: layers.0.experts.up: Q4_K: no such scheme; there are W2A16"),
        ({"embedding": "W8A16"}, "p: embedding: stays BF16, not W8A16"),
        ({"layers.0.router": "F32"}, "p: layers.0.router: stays BF16, not F32"),
        ({"layers.9.experts.up": "W8A16"}, "the checkpoint has no such weight"),
    ):
        with pytest.raises(PlanError, match=message):
            from_json(json.dumps(kinds | change), checkpoint.weights, "p", made=menu.given)
