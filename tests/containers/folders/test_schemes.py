"""Every scheme: written as compressed-tensors has it, decoded by its code, bit for bit what we decode."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
from transformers import AutoModelForCausalLM

from moequant.checkpoint import load, open_checkpoint
from moequant.commands.convert import Settings, convert
from moequant.containers.folders import compressed_tensors, schemes
from moequant.errors import PlanError
from moequant.forward.experts import EXPERTS
from moequant.forward.model import build_model
from moequant.statistics.calibrate import calibrate
from tests import models
from tests.containers.folders.cases import own_decoder, quantized
from tests.forward.test_stream import rows

FAMILIES = {
    "mixtral": {"intermediate_size": 384, "num_hidden_layers": 1},
    "qwen3_moe": {"moe_intermediate_size": 128, "num_experts": 4},
    "deepseek_v3": {"moe_intermediate_size": 128, "num_hidden_layers": 2},
}
ERRORS = {
    "W2A16": 0.35, "W3A16": 0.06, "W4A16": 0.012, "W5A16": 3e-3, "W6A16": 8e-4, "W7A16": 2e-4, "W8A16": 6e-5,
    "W8A8": 2e-4, "FP8_DYNAMIC": 8e-4, "FP8_BLOCK": 8e-4, "MXFP4A16": 0.015, "NVFP4A16": 0.01,
}  # fmt: skip
"""The largest relative squared error that the plain search leaves of normal weights."""
IDS = torch.randint(1, models.VOCAB, (1, 48), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("scheme", ERRORS)
@pytest.mark.parametrize("family", FAMILIES)
def test_their_decoder_and_ours_say_the_same(tiny, tmp_path: Path, family: str, scheme: str) -> None:
    out, model = tmp_path / "out", tiny(family, **FAMILIES[family])
    made, losses = quantized(model, out, scheme=scheme)
    theirs, ours = compressed_tensors.open_folder(out), own_decoder(out)
    kinds = {choice.weight: choice.format for choice in made.plan.choices}
    assert sum(kind == scheme for kind in kinds.values()) == len(losses) > 0
    for weight in made.checkpoint.weights:
        exact, decoded = load(weight), theirs.load(weight)
        assert torch.equal(decoded, ours.load(weight)) and decoded.shape == weight.shape
        if kinds[weight.name] != scheme:
            assert torch.equal(decoded, exact), "kept weights are copied"
            continue
        off = (decoded.float() - exact.float()).square().sum((-1, -2)) / exact.float().square().sum((-1, -2))
        assert (off < ERRORS[scheme]).all(), (weight.name, off)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    parsed = QuantizationConfig(**config)
    (group,) = parsed.config_groups.values()
    preset = preset_name_to_scheme(scheme, ["Linear"])
    no_zeros = {"weights": {"zp_dtype"}, "input_activations": {"zp_dtype"}}  # all of them are symmetric
    assert group.model_dump(exclude={"format": True, **no_zeros}) == preset.model_dump(
        exclude={"format": True, **no_zeros}
    )
    assert group.format == parsed.format
    stored = sum(choice.bytes for choice in made.plan.choices)
    shapes = sum(16 for name in theirs.tensors if name.endswith("weight_shape"))
    assert stored + shapes == sum(theirs.tensor(name).nbytes for name in theirs.tensors)


LOADS = ["W3A16", "W4A16", "W8A16", "FP8", "FP8_DYNAMIC", "MXFP4A16"]
"""Schemes whose experts transformers 5.23 decodes as they are meant."""


@pytest.mark.parametrize("scheme", LOADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_computes_what_our_decoder_predicts(
    tiny, tmp_path: Path, family: str, scheme: str
) -> None:
    out, model = tmp_path / "out", tiny(family, **FAMILIES[family])
    scales = schemes.find(scheme).scales_inputs
    quantized(model, out, calibrate(open_checkpoint(model), rows(2)) if scales else None, scheme=scheme)
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype="auto", experts_implementation="eager")
    loaded = torch.nn.Module.float(loaded.eval())
    ours = build_model(open_checkpoint(model), EXPERTS, own_decoder(out).load)
    with torch.inference_mode():
        assert (loaded(IDS).logits - ours(IDS).logits).abs().max() < 1e-3


def test_what_transformers_5_23_gets_wrong(tiny, tmp_path: Path) -> None:
    """Its loader of fused experts: squares of scales are not spread, integers that are not packed are not
    found, and the number of NVFP4 is dropped. vLLM and compressed-tensors read all of it as it is meant."""
    model = tiny("qwen3_moe", moe_intermediate_size=128)
    assert {one.name for one in schemes.PRESETS.values() if not one.in_transformers} == {
        "FP8_BLOCK", "W8A8", "NVFP4A16", "NVFP4"
    }  # fmt: skip
    for scheme in ("FP8_BLOCK", "W8A8", "NVFP4A16"):
        quantized(model, tmp_path / scheme, scheme=scheme)
    for scheme in ("FP8_BLOCK", "W8A8"):
        with pytest.raises(RuntimeError, match="automatic conversion of the weights"):
            AutoModelForCausalLM.from_pretrained(tmp_path / scheme, dtype="auto")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "NVFP4A16", dtype="auto")
    found = dict(loaded.named_parameters())["model.layers.0.mlp.experts.down_proj"].detach().float()
    reader = compressed_tensors.open_folder(tmp_path / "NVFP4A16")
    weight = next(w for w in open_checkpoint(model).weights if w.name == "layers.0.experts.down")
    meant = reader.load(weight).float()
    number = reader.stored(weight, 0)["weight_global_scale"]
    assert torch.allclose(found[0] / number, meant[0], rtol=0.01) and float(number) > 100


@pytest.mark.parametrize("family", FAMILIES)
def test_gate_and_up_have_one_number(tiny, tmp_path: Path, family: str) -> None:
    """vLLM reads one for both of an expert; every expert has its own."""
    out = tmp_path / "out"
    made, _ = quantized(tiny(family, **FAMILIES[family]), out, scheme="NVFP4A16", quantize_attention=True)
    reader = compressed_tensors.open_folder(out)
    by_site: dict[tuple[str, int], set[float]] = {}
    for weight in made.checkpoint.weights:
        if len(weight.shape) > 1 and weight.site is not None and reader.is_quantized(weight):
            for expert in range(weight.matrices):
                number = float(reader.stored(weight, expert)["weight_global_scale"])
                by_site.setdefault((weight.site.name, expert), set()).add(number)
    assert by_site and all(len(numbers) == 1 for numbers in by_site.values())
    assert len({n for numbers in by_site.values() for n in numbers}) > len(by_site) / 4


@pytest.mark.parametrize("under", ["plain", "Hessians"])
def test_vllm_finds_nothing_to_round_again_in_squares(tiny, tmp_path: Path, text: Path, under: str) -> None:
    """On GPUs with DeepGEMM it makes scales of FP8 squares powers of two that reach the largest weight
    (`requant_weight_ue8m0_inplace`, by hand)."""
    model, out = tiny("mixtral", intermediate_size=384), tmp_path / "out"
    if under == "plain":
        quantized(model, out, scheme="FP8_BLOCK")
    else:
        settings = Settings(
            format="safetensors", scheme="FP8_BLOCK", calib=text, calib_tokens=1024, eval_tokens=0
        )
        convert(model, out, settings)
    reader, seen = compressed_tensors.open_folder(out), set[float]()
    for weight in (each for each in open_checkpoint(model).weights if each.is_expert):
        for expert in range(weight.matrices):
            stored = reader.stored(weight, expert)
            scale, codes = stored["weight_scale"].double(), stored["weight"].double()
            every = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
            squares = (codes * every).unflatten(1, (-1, 128)).unflatten(0, (-1, 128))
            reach = squares.abs().amax((1, 3), keepdim=True)
            again = squares / 2.0 ** torch.ceil(torch.log2(reach / 448))
            assert torch.equal(again.to(torch.float8_e4m3fn).double(), again), (weight.name, expert)
            seen |= set(scale.flatten().tolist())
    assert all(torch.tensor(each).log2() % 1 == 0 for each in seen)


def test_names_of_schemes() -> None:
    assert schemes.find("w4a16_g32").group == 32 and schemes.find("W2A16_CHANNEL").group == -1
    assert schemes.find("W4A16_G32").name == "W4A16_G32" and schemes.find("W4A16_G128").name == "W4A16"
    for name in ("", "W9A16", "W4A16_G100", "W4A16_G", "NVFP4A16_G32", "FP8_G32"):
        with pytest.raises(PlanError):
            schemes.find(name)


@pytest.mark.parametrize("name", [*schemes.PRESETS, "W4A16_G32", "W6A16_CHANNEL"])
def test_a_scheme_is_known_by_its_config(name: str) -> None:
    scheme = schemes.find(name)
    group = json.loads(json.dumps(scheme.config(["Linear"])))
    assert schemes.of_config(group, scheme.format) == scheme
