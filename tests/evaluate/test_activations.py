"""Activations of folders: rounded as their schemes say, and only there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams, compute_dynamic_scales_and_zp

from moequant.checkpoint import open_checkpoint
from moequant.containers.folders.schemes import PRESETS
from moequant.evaluate.activations import Rounded, described, dynamic, number_of, of_scheme, rounding
from moequant.evaluate.open_source import open_source
from tests.containers.folders.cases import quantized

WORDS = {"FP8_DYNAMIC": "float8/0", "FP8_BLOCK": "float8/128", "W8A8": "int8/0"}
TOLD = {
    "FP8_DYNAMIC": "FP8, a scale a token",
    "FP8_BLOCK": "FP8, a scale for 128 channels of a token",
    "W8A8": "int8, a scale a token",
}
"""What `compare --json` says of them."""


@pytest.mark.parametrize("scheme", PRESETS)
def test_a_scheme_says_what_becomes_of_its_inputs(scheme: str) -> None:
    told = json.loads(json.dumps(PRESETS[scheme].config(["Linear"])))["input_activations"]
    assert (number_of(told) is not None) == PRESETS[scheme].scales_inputs
    assert of_scheme(told) == WORDS.get(scheme, "F32")
    assert described({"a": of_scheme(told), "b": "F32"}) == TOLD.get(scheme, "as they are")


@pytest.mark.parametrize("word", WORDS.values())
def test_rounding_is_that_of_compressed_tensors(word: str) -> None:
    kind, group = word.split("/")
    x = torch.randn(1, 5, 256, generator=torch.Generator().manual_seed(0)) * 3  # a scale a token of a row
    strategy = {"strategy": "group", "group_size": int(group)} if int(group) else {"strategy": "token"}
    type_ = "float" if kind == "float8" else "int"
    args = QuantizationArgs(num_bits=8, type=type_, symmetric=True, dynamic=True, **strategy)
    scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Linear(1, 1))
    theirs, ours = fake_quantize(x, scale, zero, args), rounding(word)(x)
    step = 448 / 16 if type_ == "float" else 127.5  # theirs divides integers by 127.5, vLLM by 127
    assert (ours - theirs).abs().max() <= 1.01 * x.abs().max() / step
    if type_ == "float":
        assert torch.equal(ours, theirs)
    assert torch.equal(dynamic(ours, int(group), type_ == "float"), ours), "rounding again changes nothing"


@pytest.mark.parametrize("number", [2688.0, 700.3, 12.96, 1e-3, 1e6])
def test_nvfp4_is_that_of_compressed_tensors(number: float) -> None:
    """Also where the number is much too small or too large for the inputs, and for zeros and ties."""
    args = preset_name_to_scheme("NVFP4", ["Linear"]).input_activations
    assert args is not None
    x = torch.randn(40, 256, generator=torch.Generator().manual_seed(0))
    x[0], x[1, ::3], x[2] = 0, 0, x[2] * 1e4
    x[3] = torch.tensor(
        [6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -0.75, -2.5, -5, 0, 1, 2, 3]
    ).repeat(16)
    blocks, divisor = x.view(40, -1, 16), torch.tensor([number])
    scale, zero = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args, global_scale=divisor)
    theirs = fake_quantize(x, scale, zero, args, global_scale=divisor)
    ours = rounding(of_scheme({"type": "float", "num_bits": 4, "dynamic": "local"}, number))(x)
    assert torch.equal(ours, theirs)
    assert torch.equal(
        rounding(f"float4/16/{number!r}")(ours[None])[0], rounding(f"float4/16/{number!r}")(ours)
    )


def test_fp8_under_one_scale_is_that_of_compressed_tensors() -> None:
    """moequant writes no such folder, and scores those of other tools."""
    args = preset_name_to_scheme("FP8", ["Linear"]).input_activations
    assert args is not None and number_of(args.model_dump()) == ("input_scale", max)
    x, scale = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)), torch.tensor([0.004])
    word = of_scheme(args.model_dump(mode="json"), float(scale))
    ours, theirs = rounding(word)(x), fake_quantize(x, scale, torch.zeros(1), args)
    assert torch.equal(ours, theirs) and ours.abs().max() == 448 * scale
    assert described({"a": word}) == "FP8, one scale from calibration"
    assert described({"a": "float4/16/3.0", "b": "float4/16/4.0"}) == (
        "NVFP4, a scale for 16 channels of a token and one number from calibration"
    )


def test_a_folder_knows_where_inputs_are_rounded(tiny, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny("mixtral"))
    quantized(tiny("mixtral"), tmp_path / "out", scheme="FP8_DYNAMIC")
    source = open_source(tmp_path / "out", checkpoint)
    assert source.inputs is not None
    for weight in checkpoint.weights:
        assert source.inputs[weight.name] == ("float8/0" if weight.is_expert else "F32"), weight.name
    rounded = Rounded(checkpoint, source.inputs)
    assert set(rounded.by_place) == {w.site.name for w in checkpoint.weights if w.is_expert and w.site}
    (tmp_path / "out" / "moequant.json").unlink()  # as if another tool had written it
    assert open_source(tmp_path / "out", checkpoint).inputs == source.inputs
