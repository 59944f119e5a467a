"""What a config says of some modules alone, in the words of each tool that writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moequant.checkpoint.codecs.declared import read_config
from moequant.checkpoint.codecs.inputs import inputs_of
from moequant.errors import CheckpointError
from tests.checkpoint.codecs.files import one, read, seeded
from tests.checkpoint.codecs.test_gptq_awq import gptq
from tests.checkpoint.codecs.test_recognise import fp8

EXPERTS = "model.layers.3.mlp.experts"


def nvfp4(module: str) -> dict[str, Tensor]:
    return {
        f"{module}.weight": torch.randint(0, 256, (64, 32), generator=seeded()).byte(),
        f"{module}.weight_scale": torch.rand(64, 4, generator=seeded(1)).to(torch.float8_e4m3fn),
        f"{module}.weight_scale_2": torch.tensor(0.1),
        f"{module}.input_scale": torch.tensor(0.1),
    }


def mixed(**layers: str) -> dict[str, Any]:
    told = {EXPERTS: {"quant_algo": "W4A16_NVFP4", "group_size": 16}} | {
        name: {"quant_algo": algorithm} for name, algorithm in layers.items()
    }
    return {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": told}


def test_modelopt_says_it_of_all_experts_of_a_layer(tmp_path: Path) -> None:
    """An entry for a module holds for what is inside; one for the weight itself comes first."""
    module = f"{EXPERTS}.7.up_proj"
    assert one(tmp_path, nvfp4(module), mixed()).codec.name == "nvfp4"
    with pytest.raises(CheckpointError, match="holds float of 8 bits, but quant_algo W4A16_NVFP4 says"):
        one(tmp_path, fp8(module), mixed())
    assert one(tmp_path, fp8(module), mixed(**{module: "FP8"})).codec.name == "fp8"
    assert one(tmp_path, fp8("model.layers.33.mlp.experts.7.up_proj"), mixed()).codec.name == "fp8"


ON_FP8 = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "weight_block_size": [32, 32],
    "quant_algo": "MIXED_PRECISION",
    "quantized_layers": {"layers.3.ffn.experts": {"quant_algo": "NVFP4", "group_size": 16}},
    "ignore": ["*.attn.*", "head", "mtp.*"],
}
"""As nvidia/DeepSeek-V4-Flash-NVFP4 says it: ModelOpt turned the experts of a release in FP8 into NVFP4."""


@pytest.mark.parametrize("module", ["mtp.0.attn.wq_b", "layers.3.attn.wq_b", "layers.3.ffn.shared.w1"])
def test_what_modelopt_left_of_a_release_in_fp8_is_fp8(tmp_path: Path, module: str) -> None:
    blocks = {f"{module}.weight": fp8(module)[f"{module}.weight"], f"{module}.scale": torch.ones(2, 2)}
    assert one(tmp_path, blocks, ON_FP8).codec.name == "fp8"
    assert str(inputs_of(read_config(ON_FP8), f"{module}.weight")).startswith("FP8, a scale for 32")


def test_what_modelopt_turned_of_a_release_in_fp8_is_nvfp4(tmp_path: Path) -> None:
    module = "layers.3.ffn.experts.7.w1"
    assert one(tmp_path, nvfp4(module), ON_FP8).codec.name == "nvfp4"
    assert str(inputs_of(read_config(ON_FP8), f"{module}.weight")).startswith("NVFP4")
    with pytest.raises(CheckpointError, match="holds float of 8 bits, but quant_algo NVFP4 says float of 4"):
        one(tmp_path, fp8(module), ON_FP8)


def test_a_config_without_a_method_that_has_modelopts_algorithm(tmp_path: Path) -> None:
    """As ModelOpt 0.31 wrote config.json."""
    config = {"quant_algo": "FP8", "ignore": ["lm_head"], "producer": {"name": "modelopt"}}
    assert one(tmp_path, fp8("m.up_proj"), config).codec.name == "fp8"
    with pytest.raises(CheckpointError, match="ignore has 'lm_head'"):
        one(tmp_path, fp8("lm_head"), config)


@pytest.mark.parametrize("entry", ["m.q_proj", r".*q_proj.*", r"\.q_proj$"])
def test_auto_round_names_modules_and_patterns(tmp_path: Path, entry: str) -> None:
    """A pattern fits anywhere in a name."""
    tensors, weight = gptq(8, 64, 128, 32)
    told = {"quant_method": "auto-round", "bits": 4, "group_size": 128, "sym": True}
    config = told | {"extra_config": {entry: {"bits": 8, "group_size": 32}}}
    assert torch.equal(read(one(tmp_path, tensors, config)).double(), weight)
    with pytest.raises(CheckpointError, match="holds int of 8 bits, but quantization_config says int of 4"):
        one(tmp_path, tensors, told | {"extra_config": {"m.k_proj": {"bits": 8}}})
    with pytest.raises(CheckpointError, match="leaves it at 16 bits"):
        one(tmp_path, tensors, told | {"extra_config": {entry: {"bits": 16, "data_type": "float"}}})


@pytest.mark.parametrize("packing", ["auto_round", "auto_round:gptqmodel"])
def test_auto_rounds_own_packing_keeps_zero_points_as_they_are(tmp_path: Path, packing: str) -> None:
    tensors, weight = gptq(4, 64, 128, 32, version=2)
    told = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": False}
    assert torch.equal(read(one(tmp_path, tensors, told | {"packing_format": packing})).double(), weight)


def test_auto_round_packs_floats_as_compressed_tensors_does(tmp_path: Path) -> None:
    module = f"{EXPERTS}.7.up_proj"
    told = {"quant_method": "auto-round", "packing_format": "auto_round:llm_compressor", "sym": True}
    four = {
        f"{module}.weight_packed": torch.randint(0, 256, (64, 32), generator=seeded()).byte(),
        f"{module}.weight_scale": torch.randint(120, 130, (64, 2), generator=seeded(1)).byte(),
    }
    mx = {"bits": 4, "group_size": 32, "data_type": "mx_fp"}
    assert one(tmp_path, four, told | mx).codec.name == "mxfp4"
    with pytest.raises(CheckpointError, match="float of 4 bits, but quantization_config says float of 8"):
        one(tmp_path, four, told | mx | {"bits": 8})
    with pytest.raises(CheckpointError, match="data_type is mx_int"):
        one(tmp_path, four, told | mx | {"data_type": "mx_int"})


@pytest.mark.parametrize(("group", "scale"), [(-1, (64,)), (0, ()), ([32, 32], (2, 2))])
def test_auto_round_in_fp8(tmp_path: Path, group: Any, scale: tuple[int, ...]) -> None:
    told = {"quant_method": "auto-round", "packing_format": "auto_round:fp8_static", "data_type": "fp8"}
    tensors = {"m.weight": fp8("m")["m.weight"], "m.weight_scale": torch.full(scale, 0.5)}
    stored = one(tmp_path, tensors, told | {"bits": 8, "group_size": group})
    assert torch.equal(read(stored).double(), tensors["m.weight"].double() / 2)
