"""GPTQ folders: the layout as the format's own packing defines it, the codes of the other layout."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from moequant.containers.folders import compressed_tensors, gptq
from moequant.containers.folders.plan import modules, storage
from moequant.containers.folders.storage import GptqIntegers, PackedIntegers
from moequant.errors import PlanError, VerifyError
from tests import models
from tests.containers.folders.cases import quantized, released


def unpacked(words: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """Unsigned fields of int32 words, lowest first, along `axis`: written from the format's description."""
    shifts = np.arange(0, 32, bits)
    fields = (words.astype(np.int64) & 0xFFFFFFFF)[..., None] >> shifts & (1 << bits) - 1
    return np.moveaxis(fields, -1, axis + 1).reshape(
        *(size * (len(shifts) if i == axis else 1) for i, size in enumerate(words.shape))
    )


@pytest.mark.parametrize("bits, group", [(4, 128), (4, -1), (8, 32)])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe"])
def test_layout_and_values(tiny, tmp_path: Path, family: str, bits: int, group: int) -> None:
    """weight[out, in] = (code - (stored zero + 1)) · scale, as GPTQ's first version defines it."""
    model = tiny(family, num_hidden_layers=1)
    made, _ = quantized(model, tmp_path / "g", layout="gptq", bits=bits, group_size=group)
    quantized(model, tmp_path / "c", bits=bits, group_size=group)
    theirs, other = gptq.open_folder(tmp_path / "g"), compressed_tensors.open_folder(tmp_path / "c")
    kind = storage(made.checkpoint, made.settings.wanted, "gptq")
    packed = storage(made.checkpoint, made.settings.wanted, "compressed-tensors")
    assert isinstance(kind, GptqIntegers) and isinstance(packed, PackedIntegers)
    fmt = kind.fmt
    for weight in made.checkpoint.weights:
        if not theirs.is_quantized(weight):
            assert torch.equal(theirs.load(weight), other.load(weight))
            continue
        decoded = theirs.load(weight)
        for expert in range(weight.matrices):
            stored = {name: tensor.numpy() for name, tensor in theirs.stored(weight, expert).items()}
            codes = unpacked(stored["qweight"], bits, 0)
            zeros = unpacked(stored["qzeros"], bits, 1)
            assert (zeros == (1 << bits - 1) - 1).all() and stored["scales"].dtype == np.float16
            assert stored["g_idx"].tolist() == [i // fmt.size(weight.n_in) for i in range(weight.n_in)]
            rows = stored["g_idx"]
            values = (codes - (zeros[rows] + 1)).astype(np.float16) * stored["scales"][rows]
            assert np.array_equal(values.T, decoded[expert].numpy())
            ours, scales = packed.integers(other.stored(weight, expert), weight.n_in)
            assert np.array_equal(ours.numpy().astype(int) + (1 << bits - 1), codes.T), "the same codes"
            assert np.array_equal(scales.float().numpy().T, stored["scales"].astype(np.float32))


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "glm4_moe"])
def test_what_stays_is_named_so_that_loaders_skip_it(
    tiny, tmp_path: Path, family: str, attention: bool
) -> None:
    """A layer that predicts, kept as it is, has names like those of quantized layers."""
    settings = {"layout": "gptq", "quantize_attention": attention, "group_size": 32}
    made, _ = quantized(released(tiny, tmp_path, family), tmp_path / "g", **settings)
    config = json.loads((tmp_path / "g" / "config.json").read_text())["quantization_config"]
    assert config == json.loads((tmp_path / "g" / "quantize_config.json").read_text())
    assert (config["bits"], config["group_size"], config["sym"], config["desc_act"]) == (4, 32, True, False)
    patterns = [name.removeprefix("-:") for name in config["dynamic"]]
    assert all(name.startswith("-:") for name in config["dynamic"])

    def skipped(module: str) -> bool:
        return any(re.match(pattern, module) for pattern in patterns)

    formats = {choice.weight: choice.format for choice in made.plan.choices}
    for weight in made.checkpoint.weights:
        if len(weight.shape) > 1 and weight.role != "embedding":
            for module in modules(weight):
                assert skipped(module) == (formats[weight.name] != "W4A16_G32"), module
    assert not skipped("model.layers.1.mlp.experts")
    if family == "qwen3_moe":  # vLLM asks for q, k and v by one name
        assert skipped("model.layers.1.self_attn.qkv_proj") != attention
    else:
        assert len(made.checkpoint.predictions.stored) > 20
        assert (
            skipped("model.layers.3.mlp.experts") and skipped("model.layers.0.mlp.gate_up_proj") != attention
        )


def test_what_gptq_cannot_hold(tiny, tmp_path: Path) -> None:
    model = models.build(tmp_path / "model", "qwen3_moe", moe_intermediate_size=36)
    with pytest.raises(PlanError, match="GPTQ packs 8 rows at a time, not 36"):
        quantized(model, tmp_path / "g", layout="gptq", group_size=64)
    quantized(tiny("olmoe"), tmp_path / "c")
    with pytest.raises(VerifyError, match="is compressed-tensors, expected gptq"):
        gptq.open_folder(tmp_path / "c")
