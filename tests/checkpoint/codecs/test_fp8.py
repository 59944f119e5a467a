"""FP8 as DeepSeek, DeepSeek-V4, Mistral and ModelOpt ship it; blocks at the edges and across experts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from moequant.checkpoint.codecs import activation_scales, as_shipped, recognise
from moequant.errors import CheckpointError
from tests.checkpoint.codecs.files import one, read, seeded, write

W, S = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight_scale_inv"


def codes(*shape: int, seed: int = 0) -> Tensor:
    return (torch.randn(shape, generator=seeded(seed)) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)


def scales(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=seeded(seed)) * 1e-3 + 1e-5


def by_hand(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """float64: every weight times the scale of its block, found by division."""
    rows = torch.arange(weight.shape[-2]) // block[0]
    columns = torch.arange(weight.shape[-1]) // block[1]
    return weight.double() * scale.double()[..., rows, :][..., columns]


@pytest.mark.parametrize("shape", [(256, 384), (130, 200), (1, 129), (127, 128), (300, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_are_cropped_at_the_edges(tmp_path: Path, shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = codes(*shape)
    scale = scales(-(-shape[0] // 128), -(-shape[1] // 128)).to(dtype)
    stored = one(tmp_path, {W: weight, S: scale}, {"quant_method": "fp8", "weight_block_size": [128, 128]})
    assert (stored.name, stored.shape, stored.dtype, stored.codec.name) == (W, shape, "F32", "fp8")
    assert torch.equal(read(stored), by_hand(weight, scale, (128, 128)).float())


@pytest.mark.parametrize("scale", [scales(2, 3), scales(1)[0], scales(256, 1), scales(256, 12).bfloat16()])
def test_as_transformers_reads_it(tmp_path: Path, scale: Tensor) -> None:
    weight = codes(256, 384)
    stored = one(tmp_path, {W: weight, S: scale})
    theirs = Fp8Dequantize(SimpleNamespace())._dequantize_one(weight, scale, torch.float32)
    assert torch.equal(read(stored), theirs)


@pytest.mark.parametrize("block", [(64, 128), (1, 16), (96, 40)])
def test_other_block_sizes_are_as_the_config_says(tmp_path: Path, block: tuple[int, int]) -> None:
    weight = codes(200, 144)
    scale = scales(-(-200 // block[0]), -(-144 // block[1]))
    stored = one(tmp_path, {W: weight, S: scale}, {"quant_method": "fp8", "weight_block_size": list(block)})
    assert torch.equal(read(stored), by_hand(weight, scale, block).float())


@pytest.mark.parametrize("size", [{}, {"weight_block_size": None}])
@pytest.mark.parametrize("shape", [(2, 3), (256, 1), (256,)])
def test_squares_without_their_size_are_refused(tmp_path: Path, shape: tuple[int, ...], size: dict) -> None:
    """vLLM has one number a matrix then, and fails; transformers takes squares of 128, or fails."""
    config = {"quant_method": "fp8", "activation_scheme": "dynamic"} | size
    with pytest.raises(CheckpointError, match="no weight_block_size, which is for one number") as error:
        one(tmp_path, {W: codes(256, 384), S: scales(*shape)}, config)
    assert S in str(error.value) and "\n" not in str(error.value)
    assert one(tmp_path, {W: codes(256, 384), S: scales(1)}, config).shape == (256, 384)


@pytest.mark.parametrize("as_bytes", [False, True])
def test_powers_of_two_are_exact_in_bf16(tmp_path: Path, as_bytes: bool) -> None:
    weight = codes(200, 300)
    exponents = torch.randint(100, 140, (2, 3), dtype=torch.uint8, generator=seeded(2))
    scale = exponents if as_bytes else exponents.view(torch.float8_e8m0fnu)
    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    stored = one(tmp_path, {"a.weight": weight, "a.scale": scale}, config)
    assert stored.dtype == "BF16" == as_shipped(stored)
    assert torch.equal(read(stored).double(), by_hand(weight, 2.0 ** (exponents.double() - 127), (128, 128)))


def test_five_bits_of_exponent(tmp_path: Path) -> None:
    weight, scale = codes(64, 32).to(torch.float8_e5m2), scales(64, 1)
    stored = one(tmp_path, {W: weight, S: scale})
    assert torch.equal(read(stored), (weight.double() * scale.double()).float())


def test_every_number_of_eight_bits(tmp_path: Path) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(2, 128)[:, :127]  # the last of each half is NaN
    weight = every.contiguous().view(torch.float8_e4m3fn)
    stored = one(tmp_path, {W: weight, S: torch.ones(1)[0]})
    assert torch.equal(read(stored), weight.float())


def test_fused_experts_whose_blocks_straddle_gate_and_up(tmp_path: Path) -> None:
    weight, scale = codes(3, 2 * 80, 136), scales(3, 2, 2)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    stored = one(tmp_path, {name: weight, name + "_scale_inv": scale}, config)
    assert stored.name == name
    assert torch.equal(read(stored), by_hand(weight, scale, (128, 128)).float())


@pytest.mark.parametrize("scale", [scales(3), scales(3, 1, 1), scales(1), scales(3, 160), scales(3, 160, 1)])
def test_fused_experts_with_one_scale_each(tmp_path: Path, scale: Tensor) -> None:
    weight = codes(3, 160, 136)
    stored = one(tmp_path, {"experts.w13_weight": weight, "experts.w13_weight_scale": scale})
    assert stored.name == "experts.w13_weight"
    spread = scale.double().reshape(1 if scale.numel() == 1 else 3, -1, 1)
    assert torch.equal(read(stored), (weight.double() * spread).float())


def test_square_experts_that_nobody_turned_have_a_scale_for_each_row(tmp_path: Path) -> None:
    weight, scale = codes(3, 136, 136), scales(3, 136)
    stored = one(tmp_path, {"experts.w2_weight": weight, "experts.w2_weight_scale": scale})
    assert torch.equal(read(stored), (weight.double() * scale.double()[..., None]).float())


def test_a_stack_as_modelopt_names_its_parts(tmp_path: Path) -> None:
    """Llama 4: the stack is a parameter of its own, so the names of its scales begin with it."""
    weight, name = codes(3, 160, 136), "m.feed_forward.experts.gate_up_proj"
    tensors = {name: weight, f"{name}_weight_scale": scales(1)[0], f"{name}_input_scale": scales(1)[0]}
    stored = one(tmp_path, tensors, {"quant_method": "modelopt", "quant_algo": "FP8"})
    assert stored.name == name
    assert torch.equal(read(stored), (weight.double() * scales(1)[0].double()).float())


@pytest.mark.parametrize("n_in", [160, 136])
def test_a_stack_turned_with_a_scale_for_each_output(tmp_path: Path, n_in: int) -> None:
    """ModelOpt's FP8_PER_CHANNEL_PER_TOKEN of Llama 4: [E, in, out] with scales [E, out]; gpt-oss's down_proj
    is square."""
    weight, scale, name = codes(3, n_in, 136), scales(3, 136), "m.feed_forward.experts.down_proj"
    config = {"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}
    stored = one(tmp_path, {name: weight, f"{name}_weight_scale": scale}, config)
    assert torch.equal(read(stored), (weight.double() * scale.double()[:, None]).float())


def test_mistral_and_what_scales_activations(tmp_path: Path) -> None:
    tensors = {
        "layers.0.wo.weight": codes(40, 24),
        "layers.0.wo.qscale_weight": scales(1)[0],
        "layers.0.wo.qscale_act": scales(1)[0],
        "layers.0.attention.k_scale": scales(1),
        "layers.0.norm.weight": torch.ones(24).bfloat16(),
    }
    refs = write(tmp_path, tensors)
    config = {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}
    found = recognise(refs, config)
    assert set(found) == {"layers.0.wo.weight", "layers.0.norm.weight"}
    assert set(activation_scales(refs, config)) == {"layers.0.wo.qscale_act", "layers.0.attention.k_scale"}
    expected = tensors["layers.0.wo.weight"].double() * tensors["layers.0.wo.qscale_weight"].double()
    assert torch.equal(read(found["layers.0.wo.weight"]), expected.float())


def test_nothing_is_dropped_from_a_plain_checkpoint(tmp_path: Path) -> None:
    refs = write(tmp_path, {"a.k_scale": torch.ones(3), "a.scale": torch.ones(4), "a.weight": torch.ones(4)})
    assert set(recognise(refs, None)) == set(refs) and not activation_scales(refs, None)


def test_qkv_saved_by_ranks(tmp_path: Path) -> None:
    weight, scale = codes(4 * 264, 128), scales(4 * 3, 1)
    name = "model.layers.0.self_attn.qkv_proj.weight"
    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    stored = one(tmp_path, {name: weight, name + "_scale_inv": scale}, config)
    ranks = [by_hand(weight[264 * r :][:264], scale[3 * r :][:3], (128, 128)) for r in range(4)]
    assert torch.equal(read(stored), torch.cat(ranks).float())
    with pytest.raises(CheckpointError, match=r"only one of \[4, 8\] has"):
        one(tmp_path, {name: codes(800, 128), name + "_scale_inv": scales(8, 1)}, config)


def test_modelopt_blocks_in_four_dimensions(tmp_path: Path) -> None:
    weight, scale = codes(256, 128), scales(2, 1, 1, 1)
    config = {"quantization": {"quant_algo": "FP8_PB_WO", "exclude_modules": ["lm_head"]}}
    stored = one(tmp_path, {W: weight, W + "_scale": scale}, config)
    assert torch.equal(read(stored), by_hand(weight, scale[:, 0, :, 0], (128, 128)).float())


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (
            scales(3, 2),
            r"weight_scale_inv is \[3, 2\] for a weight of \[256, 256\], expected blocks of \[128",
        ),
        (scales(2), r"weight_scale_inv is \[2\] .* expected one for each block"),
        (
            torch.tensor([[1.0, torch.nan], [1.0, torch.inf]]),
            "weight_scale_inv: 2 of 4 scales are NaN or inf",
        ),
        (torch.full((2, 2), 3e38), r"up_proj.weight: \d+ of 65536 values read are NaN or beyond f32"),
        (torch.full((2, 2), 255, dtype=torch.uint8), "weight_scale_inv: 4 of 4 scales are NaN"),
    ],
)
def test_damaged_scales(tmp_path: Path, scale: Tensor, message: str) -> None:
    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    with pytest.raises(CheckpointError, match=message):
        one(tmp_path, {W: codes(256, 256), S: scale}, config).read()


def test_codes_that_are_no_number(tmp_path: Path) -> None:
    weight = codes(256, 256)
    weight.view(torch.uint8)[3, 5], weight.view(torch.uint8)[200, 7] = 0x7F, 0xFF
    stored = one(tmp_path, {W: weight, S: scales(2, 2)})
    with pytest.raises(CheckpointError, match=r"up_proj.weight: 2 of 65536 values read are NaN .* damaged"):
        stored.read()
    assert stored.read(rows=range(4, 200)).isfinite().all()


def test_a_file_that_ends_early(tmp_path: Path) -> None:
    stored = one(tmp_path, {W: codes(256, 256), S: scales(2, 2)})
    path = Path(str(stored.parts["weight"].file))
    path.write_bytes(path.read_bytes()[:40000])
    with pytest.raises(CheckpointError, match="ends inside tensor"):
        stored.read()
