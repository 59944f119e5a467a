"""Activations of folders: rounded as their schemes say, and only there."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams, compute_dynamic_scales_and_zp

from moequant.checkpoint import open_checkpoint
from moequant.checkpoint.codecs.declared import read_config
from moequant.checkpoint.codecs.inputs import Inputs, inputs_of, of_group
from moequant.containers.folders.schemes import PRESETS
from moequant.evaluate.activations import Rounded, dynamic, rounding
from moequant.evaluate.open_source import open_source
from tests.containers.folders.cases import quantized

TOLD = {
    "FP8_DYNAMIC": Inputs("FP8", 0),
    "FP8_BLOCK": Inputs("FP8", 128),
    "W8A8": Inputs("int8", 0),
    "FP8": Inputs("FP8", endings=("input_scale",)),
    "NVFP4": Inputs("NVFP4", 16, endings=("input_global_scale",)),
}


@pytest.mark.parametrize("scheme", PRESETS)
def test_a_scheme_says_what_becomes_of_its_inputs(scheme: str) -> None:
    group = json.loads(json.dumps(PRESETS[scheme].config(["Linear"])))
    config = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    told = inputs_of(read_config(config), "a.q_proj.weight")
    assert bool(told.endings) == PRESETS[scheme].scales_inputs
    assert replace(told, elsewhere="") == TOLD.get(scheme, Inputs())
    # vLLM leaves inputs alone only where its GPU has no kernel for MXFP4.
    assert ("MXFP4" in told.elsewhere) == (scheme == "MXFP4A16")


@pytest.mark.parametrize(
    "preset", ["FP8", "FP8_BLOCK", "FP8_DYNAMIC", "MXFP8", "NVFP4", "W8A8", "MXFP4", "INT8"]
)
def test_presets_of_other_tools_are_known_or_said_not_to_be(preset: str) -> None:
    args = preset_name_to_scheme(preset, ["Linear"]).input_activations
    assert args is not None
    told = of_group(args.model_dump(mode="json"))
    assert told.numbers and not told.untold
    assert told.power == preset.startswith("MX")


@pytest.mark.parametrize("told", [TOLD["FP8_DYNAMIC"], TOLD["FP8_BLOCK"], TOLD["W8A8"]])
def test_rounding_is_that_of_compressed_tensors(told: Inputs) -> None:
    x = torch.randn(1, 5, 256, generator=torch.Generator().manual_seed(0)) * 3  # a scale a token of a row
    strategy = {"strategy": "group", "group_size": told.group} if told.group else {"strategy": "token"}
    type_ = "float" if told.numbers == "FP8" else "int"
    args = QuantizationArgs(num_bits=8, type=type_, symmetric=True, dynamic=True, **strategy)
    scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Linear(1, 1))
    theirs, ours = fake_quantize(x, scale, zero, args), rounding(told)(x)
    step = 448 / 16 if type_ == "float" else 127.5  # theirs divides integers by 127.5, vLLM by 127
    assert (ours - theirs).abs().max() <= 1.01 * x.abs().max() / step
    if type_ == "float":
        assert torch.equal(ours, theirs)
    assert torch.equal(dynamic(ours, told), ours), "rounding again changes nothing"


@pytest.mark.parametrize(
    "told", [TOLD["FP8_BLOCK"], Inputs("MXFP4", 32, power=True), Inputs("NVFP4", 16, number=700.3)]
)
def test_the_last_channels_may_be_fewer_than_share_a_scale(told: Inputs) -> None:
    x = torch.randn(3, 200, generator=torch.Generator().manual_seed(0))
    x[:, -1] = 5  # the largest of those that are left over
    whole, last = 200 // told.group * told.group, 200 % told.group
    filled = torch.cat([x[:, whole:], torch.zeros(3, told.group - last)], 1)
    as_rounded = rounding(told)
    parts = [as_rounded(x[:, :whole]), as_rounded(filled)[:, :last]]
    assert torch.equal(as_rounded(x), torch.cat(parts, 1))
    assert as_rounded(x[:0]).shape == (0, 200)


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
    told = replace(TOLD["NVFP4"], number=number)
    ours = rounding(told)(x)
    assert torch.equal(ours, theirs)
    assert torch.equal(rounding(told)(ours[None])[0], rounding(told)(ours))


def test_mxfp4_is_that_of_compressed_tensors() -> None:
    """Also where the largest lies just at a power of two, or where the next one begins; zeros and ties."""
    args = preset_name_to_scheme("MXFP4", ["Linear"]).input_activations
    assert args is not None
    told = of_group(args.model_dump(mode="json"))
    assert told == Inputs("MXFP4", 32, power=True)
    x = torch.randn(40, 256, generator=torch.Generator().manual_seed(0))
    x[0], x[1, ::3], x[2], x[3] = 0, 0, x[2] * 1e4, x[3] * 1e-6
    ties = [6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -0.75, -2.5, -5, 0, 1, 2, 3]
    x[4] = torch.tensor(ties).repeat(16)
    edges = torch.tensor([4.0, 6.99, 7.0, 7.01, 8.0, 3.5, 3.499, 1.0])
    x[5] = (torch.rand(8, 32, generator=torch.Generator().manual_seed(1)) * edges[:, None]).flatten()
    x[5, ::32] = edges
    blocks = x.view(40, -1, 32)
    scale, zero = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args)
    theirs = fake_quantize(x, scale, zero, args)
    ours = rounding(told)(x)
    assert torch.equal(ours, theirs)
    assert ours.abs().amax() > 0 and not ours[0].any()


def test_fp8_under_one_scale_is_that_of_compressed_tensors() -> None:
    args = preset_name_to_scheme("FP8", ["Linear"]).input_activations
    assert args is not None
    told = of_group(args.model_dump(mode="json"))
    assert told == Inputs("FP8", endings=("input_scale",))
    x, scale = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)), torch.tensor([0.004])
    ours = rounding(replace(told, number=float(scale)))(x)
    theirs = fake_quantize(x, scale, torch.zeros(1), args)
    assert torch.equal(ours, theirs) and ours.abs().max() == 448 * scale


def test_a_folder_knows_where_inputs_are_rounded(tiny, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny("mixtral"))
    quantized(tiny("mixtral"), tmp_path / "out", scheme="FP8_DYNAMIC")
    source = open_source(tmp_path / "out", checkpoint)
    assert source.inputs is not None
    for weight in checkpoint.weights:
        assert source.inputs[weight.name] == (TOLD["FP8_DYNAMIC"] if weight.is_expert else Inputs()), (
            weight.name
        )
    rounded = Rounded(checkpoint, source.inputs)
    assert set(rounded.by_place) == {w.site.name for w in checkpoint.weights if w.is_expert and w.site}
    (tmp_path / "out" / "moequant.json").unlink()  # as if another tool had written it
    assert open_source(tmp_path / "out", checkpoint).inputs == source.inputs
