"""MXFP4, MXFP6 and NVFP4 in every packing, decoded and taken over into ggml's blocks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from gguf import GGMLQuantizationType, quants
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moequant.checkpoint.codecs import as_shipped, multiplier, recognise, repack
from moequant.errors import CheckpointError
from moequant.formats import dequantize
from tests.checkpoint.codecs.files import one, read, seeded, write

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)


def some_bytes(*shape: int, low: int = 0, high: int = 256, seed: int = 0) -> Tensor:
    return torch.randint(low, high, shape, dtype=torch.uint8, generator=seeded(seed))


def by_hand(packed: Tensor, scale: Tensor, group: int) -> Tensor:
    """float64: the low nibble first, `scale` for each `group`."""
    values = torch.empty(*packed.shape[:-1], 2 * packed.shape[-1], dtype=torch.float64)
    values[..., 0::2], values[..., 1::2] = E2M1[(packed & 15).long()], E2M1[(packed >> 4).long()]
    return values * scale.double().repeat_interleave(group, -1)


def e4m3(*shape: int) -> Tensor:
    return some_bytes(*shape, high=0x7F, seed=5).view(torch.float8_e4m3fn)


def unblocked(blocks: Tensor, name: str) -> Tensor:
    """What gguf-py makes of blocks."""
    return torch.from_numpy(quants.dequantize(blocks.numpy(), GGMLQuantizationType[name]))


def test_gpt_oss(tmp_path: Path) -> None:
    blocks, scales = some_bytes(3, 10, 4, 16), some_bytes(3, 10, 4, low=90, high=150, seed=1)
    name = "model.layers.0.mlp.experts.gate_up_proj_blocks"
    tensors = {
        name: blocks,
        name.replace("_blocks", "_scales"): scales,
        name.replace("_blocks", "_bias"): torch.ones(3, 10).bfloat16(),
    }
    found = recognise(
        write(tmp_path, tensors), {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    )
    assert set(found) == {name, name.replace("_blocks", "_bias")}
    stored = found[name]
    assert (stored.shape, stored.dtype, stored.bytes) == ((3, 10, 128), "BF16", 3 * 10 * 4 * 17)
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16).transpose(1, 2)
    assert torch.equal(read(stored), theirs)
    assert as_shipped(stored) == "MXFP4"
    for index in range(3):
        taken = repack(stored, "MXFP4", index, range(2, 9))
        assert taken.shape == (7, 4 * 17)
        assert torch.equal(unblocked(taken, "MXFP4").bfloat16(), theirs[index, 2:9])


@pytest.mark.parametrize("scale_name", ["a.scale", "a.weight_scale", "a.weight_scale_inv"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_two_codes_to_a_byte(tmp_path: Path, scale_name: str, dtype: torch.dtype) -> None:
    packed, exponents = some_bytes(9, 48), some_bytes(9, 3, low=0, high=250, seed=1)
    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}  # which is for the other weights
    scale = exponents.view(torch.float8_e8m0fnu) if dtype == torch.int8 else exponents
    stored = one(tmp_path, {"a.weight": packed.view(dtype), scale_name: scale}, config)
    expected = by_hand(packed, 2.0 ** (exponents.double() - 127), 32)
    assert stored.codec.name == "mxfp4"
    assert torch.equal(read(stored).double(), expected)
    assert torch.equal(unblocked(repack(stored, "MXFP4", None, range(9)), "MXFP4").double(), expected)


@pytest.mark.parametrize("alone", [True, False])
def test_nvfp4_of_stacks_that_are_turned(tmp_path: Path, alone: bool) -> None:
    """ModelOpt's Llama 4 and gpt-oss: packed along the inputs, and stored [E, in, out] all the same."""
    packed, scale = some_bytes(3, 24, 48), e4m3(3, 24, 6)  # [E, out, in / 2]
    whole = torch.tensor(0.37) if alone else torch.tensor([0.37, 1.5, 2e-3])
    name = "m.feed_forward.experts.gate_up_proj"
    tensors = {
        name: packed.mT,
        f"{name}_weight_scale": scale.view(torch.uint8).mT.contiguous().view(torch.float8_e4m3fn),
        f"{name}_weight_scale_2": whole,
        f"{name}_input_scale": torch.tensor(1.0),
    }
    stored = one(tmp_path, tensors, {"quant_method": "modelopt", "quant_algo": "NVFP4"})
    expected = by_hand(packed, scale.float(), 16).mT * whole.double().reshape(-1, 1, 1)
    assert (stored.name, stored.shape, as_shipped(stored)) == (name, (3, 96, 24), None)
    assert torch.allclose(read(stored).double(), expected, rtol=1e-6, atol=0)


def scheme(group: int, strategy: str, **more: object) -> QuantizationScheme:
    args = QuantizationArgs(num_bits=4, type="float", strategy=strategy, group_size=group, **more)
    return QuantizationScheme(targets=["Linear"], weights=args)


def test_mxfp4_of_compressed_tensors(tmp_path: Path) -> None:
    weight = torch.randn(24, 96, generator=seeded())
    scale = 2.0 ** torch.randint(-9, -1, (24, 3), generator=seeded(1)).float()
    compressor, s = BaseCompressor.get_value_from_registry("mxfp4-pack-quantized"), scheme(32, "group")
    packed = compressor.compress({"weight": weight, "weight_scale": scale}, s)
    config = {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": s.weights.model_dump(mode="json")}},
    }
    stored = one(tmp_path, {f"a.{name}": tensor for name, tensor in packed.items()}, config)
    theirs = compressor.decompress(packed, s)["weight"]
    assert stored.name == "a.weight" and torch.equal(read(stored).float(), theirs.float())


def test_mxfp6_of_compressed_tensors(tmp_path: Path) -> None:
    weight = torch.randn(24, 96, generator=seeded())
    scale = 2.0 ** torch.randint(-9, -1, (24, 3), generator=seeded(1)).float()
    compressor = BaseCompressor.get_value_from_registry("mxfp6-pack-quantized")
    args = QuantizationArgs(num_bits=6, type="float", strategy="group", group_size=32)
    s = QuantizationScheme(targets=["Linear"], weights=args)
    packed = compressor.compress({"weight": weight, "weight_scale": scale}, s)
    config = {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": args.model_dump(mode="json")}},
    }
    stored = one(tmp_path, {f"a.{name}": tensor for name, tensor in packed.items()}, config)
    assert (stored.codec.name, stored.shape, stored.dtype) == ("mxfp6", (24, 96), "BF16")
    assert torch.equal(read(stored).float(), compressor.decompress(packed, s)["weight"].float())
    packed["weight_packed"] = some_bytes(24, 72)  # every code
    stored = one(tmp_path, {f"a.{name}": tensor for name, tensor in packed.items()}, config)
    assert torch.equal(read(stored).float(), compressor.decompress(packed, s)["weight"].float())


def test_nvfp4_of_compressed_tensors(tmp_path: Path) -> None:
    weight = torch.randn(24, 128, generator=seeded())
    whole = torch.tensor([(6 * 448) / weight.abs().max()])
    scale = (weight.view(24, 8, 16).abs().amax(-1) / 6 * whole).to(torch.float8_e4m3fn)
    compressor, s = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized"), scheme(16, "tensor_group")
    plain = {"weight": weight, "weight_scale": scale.float(), "weight_global_scale": whole}
    packed = compressor.compress(plain, s)
    config = {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": s.weights.model_dump(mode="json")}},
    }
    tensors = {f"a.{name}": tensor for name, tensor in packed.items()} | {"a.input_global_scale": whole}
    stored = one(tmp_path, tensors, config)
    mine = read(stored)
    exact = by_hand(packed["weight_packed"], scale, 16) / whole.double()
    assert torch.equal(mine, exact.float())
    theirs = compressor.decompress(packed, s)["weight"].float()  # in bf16, scales rounded to it too
    torch.testing.assert_close(mine, theirs, rtol=2**-7, atol=0)
    blocks = unblocked(repack(stored, "NVFP4", None, range(24)), "NVFP4")
    torch.testing.assert_close(blocks * multiplier(stored, None), mine, rtol=2**-22, atol=0)


@pytest.mark.parametrize("whole", [torch.tensor(0.37), torch.tensor([0.01])])
def test_nvfp4_of_modelopt(tmp_path: Path, whole: Tensor) -> None:
    packed, scale = some_bytes(20, 64), e4m3(20, 8)
    config = {"quantization": {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head", "b*"]}}
    tensors = {
        "a.weight": packed,
        "a.weight_scale": scale,
        "a.weight_scale_2": whole,
        "a.input_scale": whole,
    }
    stored = one(tmp_path, tensors, config)
    assert torch.equal(read(stored), (by_hand(packed, scale, 16) * whole.double()).float())
    assert as_shipped(stored) == "NVFP4"
    taken = repack(stored, "NVFP4", None, range(3, 17))
    assert torch.equal(unblocked(taken, "NVFP4") * multiplier(stored, None), stored.read(rows=range(3, 17)))
    assert torch.equal(dequantize("NVFP4", taken), unblocked(taken, "NVFP4"))
    assert repack(stored, "MXFP4", None, range(20)) is None


def test_nvfp4_experts_in_a_stack(tmp_path: Path) -> None:
    packed, scale, whole = some_bytes(3, 6, 24), e4m3(3, 6, 3), torch.tensor([0.5, 2.0, 3.0])
    tensors = {"e.w1_packed": packed, "e.w1_scale": scale, "e.w1_scale_2": whole}
    stored = one(tmp_path, tensors)
    assert stored.name == "e.w1"
    expected = by_hand(packed, scale, 16) * whole.double()[:, None, None]
    assert torch.equal(read(stored), expected.float())
    assert as_shipped(stored) is None and repack(stored, "NVFP4", 0, range(6)) is None  # 48 is not 64
    assert [float(multiplier(stored, index)) for index in range(3)] == whole.tolist()


@pytest.mark.parametrize("byte", [0x7F, 0xFF, 0x80, 0xB0])
def test_nvfp4_scales_that_have_a_sign_or_are_none(tmp_path: Path, byte: int) -> None:
    scale = e4m3(4, 4)
    scale.view(torch.uint8)[2, 1] = byte
    stored = one(
        tmp_path, {"a.weight": some_bytes(4, 32), "a.weight_scale": scale, "a.weight_scale_2": torch.ones(1)}
    )
    for use in (stored.read, lambda: repack(stored, "NVFP4", None, range(4))):
        with pytest.raises(CheckpointError, match=r"a.weight_scale: 1 of 16 scales are NaN or negative"):
            use()


def test_mxfp4_scales_that_are_none(tmp_path: Path) -> None:
    scale = some_bytes(4, 2, low=100, high=140)
    scale[1, 1] = 255
    stored = one(tmp_path, {"a.weight": some_bytes(4, 32), "a.weight_scale": scale})
    for use in (stored.read, lambda: repack(stored, "MXFP4", None, range(4))):
        with pytest.raises(CheckpointError, match=r"a.weight_scale: 1 of 8 scales are NaN"):
            use()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"a.weight_scale": e4m3(4, 5)},
            r"a.weight_scale is \[4, 5\] .* expected a scale for each 16 weights",
        ),
        (
            {"a.weight_scale": e4m3(4, 4)},
            "a.weight_scale: a.weight_scale_2 or a.weight_global_scale is missing",
        ),
        (
            {"a.weight_scale": e4m3(4, 4), "a.weight_scale_2": torch.ones(4)},
            r"a.weight_scale_2 is \[4, 1\] .* expected one number for each matrix",
        ),
        ({"a.weight_scale": torch.ones(4, 4)}, "a.weight_scale is F32 for the bytes of a.weight"),
        ({}, "a.weight is stored as U8 without scales"),
    ],
)
def test_parts_that_do_not_fit(tmp_path: Path, tensors: dict[str, Tensor], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        one(tmp_path, {"a.weight": some_bytes(4, 32)} | tensors)


def test_numbers_to_divide_by(tmp_path: Path) -> None:
    parts = {"a.weight_packed": some_bytes(4, 32), "a.weight_scale": e4m3(4, 4)}
    stored = one(tmp_path, parts | {"a.weight_global_scale": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"a.weight_global_scale: is 0"):
        stored.read()
    stored = one(tmp_path, parts | {"a.weight_global_scale": torch.tensor([np.nan])})
    with pytest.raises(CheckpointError, match=r"a.weight_global_scale: 1 of 1 scales are NaN"):
        stored.read()
