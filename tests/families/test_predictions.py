"""Layers that predict the token after the next: kept beside the model, which does not run them."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from safetensors.torch import load_file, save_file

from moequant.checkpoint import load, not_finite, open_checkpoint
from moequant.commands.convert import Settings, convert, open_job
from moequant.containers.gguf.container import GgufContainer
from moequant.containers.gguf.export import export
from moequant.containers.gguf.presets import facts
from moequant.containers.gguf.read import read_header
from moequant.containers.gguf.weights import GgufWeights
from moequant.containers.opened import open_model
from moequant.errors import FamilyError, PlanError
from moequant.evaluate.open_source import open_source
from moequant.forward.resources import Resources
from moequant.forward.stream import LayerStream
from moequant.hub.fetch import headers
from moequant.inspection.fit import Hardware, place
from moequant.inspection.gguf_file import inspect_gguf
from moequant.inspection.presets import preset_files
from moequant.plan import candidates, preset_plan
from moequant.rounding.coupled import Coupled, Rounding
from moequant.rounding.diagonal import Quantizer
from moequant.rounding.feedback import Options
from moequant.rounding.shrinkage import DIAGONAL, Trial
from moequant.rounding.streams import Streams
from moequant.runtimes.llama_cpp.kv_cache import Load
from tests import models
from tests.clients.llama import Llama, drafting, drafts

QUICK = Rounding(
    options=Options(effort="fast", rounds=0, threads=1),
    trial=Trial(mixes=(DIAGONAL,), experts=1, rows=4),
)
"""Coupled rounding with no search in it."""


def released(folder: Path, family: str) -> Path:
    """A tiny checkpoint as people release it."""
    return models.as_released(models.build(folder / "model", family), family)


@pytest.mark.parametrize("told", [{"": None}, "x", [1], 1.5])
def test_a_count_that_is_no_number_is_named(tiny, tmp_path: Path, told: object) -> None:
    folder = Path(shutil.copytree(tiny("deepseek_v3"), tmp_path / "model"))
    models.edit_config(folder, num_nextn_predict_layers=told)
    with pytest.raises(FamilyError, match=r"num_nextn_predict_layers = .*a number of layers was expected"):
        open_checkpoint(folder)


@pytest.mark.parametrize("family", models.PREDICTIONS)
def test_a_file_with_them_computes_as_one_without(tmp_path: Path, text: Path, family: str) -> None:
    """And its last block holds the checkpoint's values, under the names and in the shapes that llama.cpp
    drafts with."""
    folder, files = released(tmp_path, family), (tmp_path / "with.gguf", tmp_path / "without.gguf")
    for file, mtp in zip(files, (True, False), strict=True):
        given = Settings("F32", text, 2048, text, effort="fast", eval_tokens=0, self_check=False, mtp=mtp)
        said = " ".join(convert(folder, file, given).notes)
        assert ("kept: llama.cpp drafts with it" if mtp else "left out") in said and "multi-token" in said
    logits = []
    for file in files:
        with Llama(file, threads=1) as llama:
            ids = torch.randint(1, llama.n_vocab, (64,), generator=torch.Generator().manual_seed(0))
            logits.append(llama.logits(ids.tolist()))
    assert np.array_equal(*logits)
    assert not drafting(files[0])
    checkpoint = open_checkpoint(folder)
    weights = checkpoint.predictions.weights
    assert weights and not any(each.adds for each in weights), (
        "nobody runs them: there is no stream to correct"
    )
    assert {each.name for weight in weights for each in weight.origin.stored} == {
        each.name for each in checkpoint.predictions.stored
    }
    assert models.predicting(folder, family).keys() == {each.name for each in checkpoint.predictions.stored}
    opened = GgufWeights(files[0], export(checkpoint))
    for weight in weights:
        assert torch.allclose(opened.load(weight), load(weight).float(), rtol=1e-6, atol=1e-7), weight.name


AROUND = {
    "deepseek_v3": ("model.layers.3.", "eh_proj", "enorm", "hnorm", "shared_head.norm"),
    "glm4_moe": ("model.layers.3.", "eh_proj", "enorm", "hnorm", "shared_head.norm"),
    "qwen3_next": ("mtp.", "fc", "pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"),
}
"""How releases name what stands around a layer that predicts: the product of both inputs, the norms of the
token's embedding and of the hidden state, and the last norm."""


def predicted(folder: Path, family: str, ids: torch.Tensor) -> torch.Tensor:
    """Logits of a layer that predicts, with transformers' own classes: the next token's embedding and the
    hidden state behind the final norm, each normed, in one product; a layer; a norm; the head."""
    prefix, join, *norms = AROUND[family]
    ((number, under),) = models.PREDICTIONS[family].like.items()
    stored = load_file(folder / "model-mtp.safetensors")
    around = {name.removeprefix(prefix): each.float() for name, each in stored.items()}
    with torch.inference_mode():
        model = models.reference(folder)
        states = model.model(ids[None]).last_hidden_state[0]
    # The same model, with the layer that predicts in the place of the one that it is like.
    other = Path(shutil.copytree(folder, folder.parent / "other"))
    own = {name: each for name, each in stored.items() if name.startswith(under)}
    tensors = load_file(other / "model.safetensors")
    renamed = {name.replace(under, f"model.layers.{number}.", 1): each for name, each in own.items()}
    tensors |= {name: each for name, each in renamed.items() if name in tensors}
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    changed = models.reference(other)
    first, second, last = (copy.deepcopy(changed.model.norm) for _ in norms)
    for norm, name in zip((first, second, last), norms, strict=True):
        norm.weight.data = around[f"{name}.weight"]
    shown = around.get("embed_tokens.weight", changed.model.embed_tokens.weight)
    changed.lm_head.weight.data = around.get("shared_head.head.weight", changed.lm_head.weight.data)
    changed.model.layers = torch.nn.ModuleList([changed.model.layers[number]])
    changed.model.norm = last
    changed.config.num_hidden_layers = 1
    if kinds := getattr(changed.config, "layer_types", None):
        changed.config.layer_types = [kinds[number]]
    with torch.inference_mode():
        both = torch.cat([first(shown[ids[1:]]), second(states[:-1])], -1)
        made = (both @ around[f"{join}.weight"].T)[None]
        places = torch.arange(1, len(ids))[None]
        found: torch.Tensor = changed(inputs_embeds=made, position_ids=places, use_cache=False).logits[0]
    return found


@pytest.mark.parametrize("family", AROUND)
def test_llama_cpp_drafts_what_the_layer_computes(tmp_path: Path, text: Path, family: str) -> None:
    """The file has the layer's weights where llama.cpp's own drafting looks for them, in its order."""
    folder, file = released(tmp_path, family), tmp_path / "with.gguf"
    given = {"effort": "fast", "eval_tokens": 0, "self_check": False}
    convert(folder, file, Settings("F32", text, 1024, text, **given))
    ids = torch.randint(1, models.VOCAB, (48,), generator=torch.Generator().manual_seed(0))
    expected = predicted(folder, family, ids).numpy()
    difference = np.abs(drafts(file, ids.tolist()) - expected).max(1)
    assert np.quantile(difference, 0.95) < 5e-4 < np.abs(expected).max(), difference


def test_a_quantized_one_is_a_step_safer(tmp_path: Path, text: Path) -> None:
    """Its weights are rounded under the statistics of the layer that they are like."""
    folder, file = released(tmp_path, "qwen3_5_moe"), tmp_path / "small.gguf"
    given = Settings("Q4_K_M", text, 1024, text, effort="fast", eval_tokens=0, self_check=False)
    report = convert(folder, file, given)
    types = {choice.weight: choice for choice in report.plan.choices}
    weights = {weight.name: weight for weight in report.checkpoint.weights}
    for name in ("attn_q", "attn_out", "experts.gate", "experts.down", "shared.up"):
        own, twin = types[f"layers.2.{name}"], types[f"layers.1.{name}"]
        allowed = sorted(candidates(weights[f"layers.2.{name}"]), key=bits)
        assert own.format == [*allowed, allowed[-1]][allowed.index(twin.format) + 1], name
        assert "safer" in own.reason
    lost = {loss.weight: loss for loss in report.losses}
    seen = [lost[f"layers.{layer}.experts.down"].tokens for layer in (1, 2)]
    assert torch.equal(*seen) and types["layers.2.nextn.join"].format == "Q8_0"
    assert "multi-token prediction kept" in report.summary()


def test_that_step_keeps_no_preset_from_being_made(tmp_path: Path) -> None:
    """Tables give no weight fewer bits than llama.cpp does. Where drafts get more, others get the next fewer;
    of IQ1_S there are none, and a third of this model drafts."""
    folder = headers(released(tmp_path, "qwen3_5_moe"))
    made = {each.name: {tensor.type for tensor in each.header.tensors} for each in preset_files(folder)}
    assert {"Q8_0", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q3_K_S", "IQ2_XXS", "IQ1_M"} <= made.keys()
    assert "IQ1_S" not in made
    with pytest.raises(PlanError, match="IQ1_S: the smallest possible file"):
        exported = export(open_model(folder))
        preset_plan(exported.weights, "IQ1_S", facts(exported))
    assert min(map(bits, made["Q6_K"])) == bits("Q5_K"), made["Q6_K"]


def bits(name: str) -> float:
    """Bits per weight, by gguf-py."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    return 8 * size / block


def test_rounding_under_hessians_comes_to_them_before_the_head(tmp_path: Path) -> None:
    """They are not run, so the plain search packs them."""
    checkpoint = GgufContainer(open_checkpoint(released(tmp_path, "qwen3_next"))).checkpoint
    types = {weight.name: "Q8_0" for weight in checkpoint.weights if not weight.role.keeps_precision}
    ids = torch.randint(1, models.VOCAB, (2, 16), generator=torch.Generator().manual_seed(0))
    with LayerStream(checkpoint, ids, Resources(threads=1, batch_tokens=32)) as stream:
        coupled = Coupled(stream, types, Quantizer(None, "fast").pack, QUICK)
        made = [packed.weight.name for packed, _ in coupled.run(Streams.under(tmp_path, stream))]
    assert made == list(types) and made[-1] == "head" and "layers.2.experts.up" in made


def test_what_nobody_describes_is_left_out_of_files_with_the_reason(tmp_path: Path, text: Path) -> None:
    folder = released(tmp_path, "exaone_moe")
    (note,) = export(open_checkpoint(folder)).warnings
    assert "left out: 3 tensors" in note and "'exaone-moe' has no graph that drafts with it" in note
    folder = released(tmp_path / "other", "glm4_moe")
    file = folder / "model-mtp.safetensors"
    tensors = models.load_file(file)
    del tensors["model.layers.3.eh_proj.weight"]
    models.save_file(tensors, file, {"format": "pt"})
    models.indexed(folder)
    (note,) = export(open_checkpoint(folder)).warnings
    assert re.search(r"left out: \d+ tensors.*layer 3 nextn is missing", note)


def test_folders_hold_copies(tmp_path: Path, text: Path) -> None:
    """In the checkpoint's precision, and named among what is not rounded."""
    folder, out = released(tmp_path, "glm4_moe"), tmp_path / "folder"
    given = {"format": "safetensors", "effort": "fast", "eval_tokens": 0, "self_check": False}
    report = convert(folder, out, Settings(None, text, 1024, text, **given))
    assert any("copied as they are" in note for note in report.notes)
    stored = models.load_file(out / "model.safetensors")
    told = models.predicting(folder, "glm4_moe")
    assert all(torch.equal(stored[name], values) for name, values in told.items())
    kept = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    for module in ("model.layers.3.eh_proj", "model.layers.3.mlp.experts.7.down_proj"):
        assert any(re.match(each.removeprefix("re:"), module) for each in kept if each.startswith("re:"))
    assert "multi-token prediction kept" in (out / "README.md").read_text()
    without = open_job(folder, Settings(None, text, 1024, text, **given, mtp=False))
    assert not told.keys() & {each.weight for each in without.plan.choices}


def test_files_with_and_without_them_are_versions_of_one_model(tmp_path: Path, text: Path) -> None:
    """And need the same memory, since nothing drafts unless it is asked to."""
    folder, files = released(tmp_path, "nemotron_h"), (tmp_path / "with.gguf", tmp_path / "without.gguf")
    for file, mtp in zip(files, (True, False), strict=True):
        given = Settings("F32", text, 1024, text, effort="fast", eval_tokens=0, self_check=False, mtp=mtp)
        convert(folder, file, given)
    checkpoint = open_checkpoint(folder)
    for file in files:
        source = open_source(file, checkpoint)
        assert source.provider is not None
        for weight in checkpoint.weights[:20]:
            assert source.provider(weight).shape == weight.shape
    memory = [place(read_header(file), Hardware(1 << 32, 1 << 32), Load(256)) for file in files]
    assert memory[0].ram.total + memory[0].gpu.total == memory[1].ram.total + memory[1].gpu.total
    inspected = [inspect_gguf(read_header(file)) for file in files]
    assert inspected[0].active == inspected[1].active and inspected[0].parameters > inspected[1].parameters


def test_of_tensors_that_are_rows_of_one_weight_the_damaged_one_is_named(tmp_path: Path) -> None:
    folder = released(tmp_path, "mimo_v2_flash")
    weights = open_checkpoint(folder).predictions.weights
    weight = next(each for each in weights if len(each.origin.stored) > 1 and not each.is_expert)
    assert torch.equal(load(weight), torch.cat([each.read() for each in weight.origin.stored]))
    name = weight.origin.stored[1].name
    (file,) = (each for each in folder.glob("*.safetensors") if name in load_file(each))
    tensors = load_file(file)
    tensors[name][0, :3] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    damaged = next(each for each in open_checkpoint(folder).predictions.weights if each.name == weight.name)
    told = not_finite(damaged, load(damaged))
    assert told is not None and told.startswith(f"tensor {name} ") and ": 3 of " in told
