"""AMD Quark's checkpoints: decoded by a formula in float64, and every number that is not read refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from moequant.checkpoint.codecs import as_shipped, repack
from moequant.checkpoint.codecs.declared import read_config
from moequant.checkpoint.codecs.inputs import inputs_of
from moequant.errors import CheckpointError
from tests.checkpoint.codecs.files import one, read, seeded

EXPERT = "model.layers.3.mlp.experts.7.up_proj"
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)

FP4 = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0", "ch_axis": -1}
FP8 = {"dtype": "fp8_e4m3", "qscheme": "per_channel", "ch_axis": 0, "symmetric": None}


def quark(weight: Any, inputs: Any = None, **more: Any) -> dict[str, Any]:
    every = {"weight": weight, "input_tensors": inputs, "output_tensors": None, "bias": None}
    exported = {"pack_method": "reorder", "weight_format": "real_quantized"}
    return {
        "quant_method": "quark",
        "global_quant_config": every,
        "layer_quant_config": {},
        "exclude": ["lm_head"],
        "export": exported,
    } | more


def mxfp4() -> tuple[dict[str, Tensor], Tensor]:
    """A checkpoint's tensors and the weight in float64: the first code of a byte in its low half."""
    codes = torch.randint(0, 16, (48, 96), generator=seeded())
    powers = torch.randint(120, 132, (48, 3), generator=seeded(1))
    values = E2M1[codes & 7] * (1 - 2 * (codes >> 3))
    values *= 2.0 ** (powers.double() - 127).repeat_interleave(32, 1)
    packed = codes[:, ::2] | codes[:, 1::2] << 4
    return {f"{EXPERT}.weight": packed.byte(), f"{EXPERT}.weight_scale": powers.byte()}, values


def in_words(codes: Tensor, order: list[int]) -> Tensor:
    """[n, 8 k] codes of 4 bits in words: nibble i is the number `order[i]` of its eight."""
    parts = (codes & 15).view(len(codes), -1, 8)[..., order].to(torch.int64)
    words = (parts << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def int4(dtype: str, order: list[int], zeros: bool = True) -> tuple[dict[str, Tensor], Tensor]:
    """Quark's groups of 32 inputs: words [in, out / 8], scales and zero points [groups, out (/ 8)]."""
    low = -8 if dtype == "int4" else 0
    codes = torch.randint(low, low + 16, (96, 48), generator=seeded())
    zero = torch.randint(low, low + 16, (3, 48), generator=seeded(2)) * int(zeros)
    scale = torch.rand(3, 48, generator=seeded(1)).half()
    values = (codes - zero.repeat_interleave(32, 0)).double() * scale.double().repeat_interleave(32, 0)
    parts = {f"{EXPERT}.weight": in_words(codes, order), f"{EXPERT}.weight_scale": scale}
    if zeros:
        parts[f"{EXPERT}.weight_zero_point"] = in_words(zero, order)
    return parts, values.T


def fp6(exponent: int) -> tuple[dict[str, Tensor], Tensor]:
    """Four codes in three bytes, the first in the lowest bits."""
    steps, bias = 2 ** (5 - exponent), 2 ** (exponent - 1) - 1
    codes = torch.randint(0, 64, (48, 96), generator=seeded())
    powers, fraction = (codes & 31) // steps, (codes & 31) % steps
    size = torch.where(powers == 0, fraction / steps * 2, 1 + fraction / steps) * 2.0 ** (powers - bias)
    scale = torch.randint(120, 132, (48, 3), generator=seeded(1))
    values = size * (1 - 2 * (codes >> 5)) * 2.0 ** (scale.double() - 127).repeat_interleave(32, 1)
    four = (codes.view(48, 24, 4) << torch.arange(0, 24, 6)).sum(-1)
    packed = (four[..., None] >> torch.arange(0, 24, 8) & 255).flatten(1)
    return {f"{EXPERT}.weight": packed.byte(), f"{EXPERT}.weight_scale": scale.byte()}, values


def fp8(scale: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    codes = torch.randn(48, 96, generator=seeded()).to(torch.float8_e4m3fn)
    rows = scale if scale.ndim != 1 else scale[:, None]
    return {f"{EXPERT}.weight": codes, f"{EXPERT}.weight_scale": scale}, codes.double() * rows.double()


def test_fp4_is_mxfp4(tmp_path: Path) -> None:
    tensors, weight = mxfp4()
    stored = one(tmp_path, tensors, quark(FP4))
    assert (stored.codec.name, stored.shape, as_shipped(stored)) == ("mxfp4", (48, 96), "MXFP4")
    assert torch.equal(read(stored).double(), weight)


@pytest.mark.parametrize("dtype", ["int4", "uint4"])
@pytest.mark.parametrize("method", ["reorder", "order"])
def test_integers_of_four_bits(tmp_path: Path, dtype: str, method: str) -> None:
    order = [0, 2, 4, 6, 1, 3, 5, 7] if method == "reorder" else list(range(8))
    tensors, weight = int4(dtype, order)
    how = {"dtype": dtype, "qscheme": "per_group", "group_size": 32, "symmetric": False}
    stored = one(tmp_path, tensors, quark(how, export={"pack_method": method}))
    assert (stored.codec.name, stored.shape) == (dtype, (48, 96))
    assert torch.equal(read(stored).double(), weight)


def test_integers_without_zero_points(tmp_path: Path) -> None:
    """They are Q4_0 of llama.cpp, with nothing rounded."""
    tensors, weight = int4("int4", [0, 2, 4, 6, 1, 3, 5, 7], zeros=False)
    how = {"dtype": "int4", "qscheme": "per_group", "group_size": 32, "symmetric": True}
    stored = one(tmp_path, tensors, quark(how))
    assert torch.equal(read(stored).double(), weight) and as_shipped(stored) == "Q4_0"
    taken = repack(stored, "Q4_0", None, range(48))
    assert torch.equal(
        torch.from_numpy(dequantize(taken.numpy(), GGMLQuantizationType.Q4_0)).double(), weight
    )
    with pytest.raises(CheckpointError, match=r"has no zero point, but .* symmetric: false"):
        one(tmp_path, tensors, quark(how | {"symmetric": False}))


@pytest.mark.parametrize(("dtype", "exponent"), [("fp6_e2m3", 2), ("fp6_e3m2", 3)])
def test_floats_of_six_bits(tmp_path: Path, dtype: str, exponent: int) -> None:
    tensors, weight = fp6(exponent)
    stored = one(tmp_path, tensors, quark(FP4 | {"dtype": dtype}))
    assert (stored.codec.name, stored.shape) == ("mxfp6", (48, 96))
    assert torch.equal(read(stored).double(), weight)


@pytest.mark.parametrize(
    ("how", "scale"),
    [
        (FP8, torch.rand(48, generator=seeded(1))),
        (FP8 | {"qscheme": "per_tensor"}, torch.tensor(0.03)),
        ([FP8], torch.rand(48, generator=seeded(1))),
    ],
)
def test_fp8_for_rows_and_for_all(tmp_path: Path, how: Any, scale: Tensor) -> None:
    tensors, weight = fp8(scale)
    stored = one(tmp_path, tensors, quark(how))
    assert torch.allclose(read(stored).double(), weight, rtol=1e-6, atol=0)


@pytest.mark.parametrize("where", [EXPERT, "*experts.7*", "*.up_proj"])
def test_a_module_of_its_own(tmp_path: Path, where: str) -> None:
    """By its name, or a pattern as of files; what is said of all then does not count."""
    config = quark(FP4, layer_quant_config={where: {"weight": FP8}})
    assert one(tmp_path, fp8(torch.ones(48))[0], config).codec.name == "fp8"
    with pytest.raises(CheckpointError, match=r"layer_quant_config\[.*\] says float of 8 bits"):
        one(tmp_path, mxfp4()[0], config)


def test_what_is_left_out_may_be_quantized_as_its_source_was(tmp_path: Path) -> None:
    config = quark(FP4, exclude=["lm_head", "*experts*"])
    assert one(tmp_path, fp8(torch.ones(48))[0], config).codec.name == "fp8"
    assert "source" in str(inputs_of(read_config(config), f"{EXPERT}.weight"))


def test_what_becomes_of_inputs() -> None:
    def told(inputs: Any) -> str:
        return str(inputs_of(read_config(quark(FP8, inputs)), f"{EXPERT}.weight"))

    assert told(None) == "as they are"
    assert told(FP8 | {"is_dynamic": True}) == "FP8, a scale a token"
    assert told(FP8 | {"qscheme": "per_tensor"}) == "FP8, one scale from calibration"
    assert told(FP4 | {"is_dynamic": True}) == "MXFP4, a scale for 32 channels of a token, a power of two"
    other = FP4 | {"is_dynamic": True, "scale_calculation_mode": "floor"}
    assert "fp4 per_group, dynamic: True" in told(other)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (quark({"dtype": "int4", "qscheme": "per_channel"}), "weights are int4 per_channel"),
        (quark({"dtype": "int8", "qscheme": "per_group", "group_size": 32}), "weights are int8 per_group"),
        (quark({"dtype": "fp6_e3m2", "qscheme": "per_group"}), "weights are fp6_e3m2 per_group, scale_form"),
        (quark([{"dtype": "fp8_e4m3"}, {"dtype": "int4"}]), "weights are fp8_e4m3 then int4"),
        (quark(FP4 | {"scale_format": None}), "global_quant_config: weights are fp4 per_group, scale_f"),
        (quark(FP8, layer_quant_config={"*": {"weight": {"dtype": "mx"}}}), r"\['\*'\]: weights are mx None"),
        (quark(FP8, export={"weight_format": "fake_quantized"}), "weight_format is fake_quantized"),
    ],
)
def test_other_numbers_are_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        one(tmp_path, fp8(torch.ones(48))[0], config)
    assert "\n" not in str(caught.value) and ";" in str(caught.value)
