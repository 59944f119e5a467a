"""AWQ folders: the layout as AutoAWQ's gemm packs it, the codes of the other layouts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moequant.containers.folders import awq, compressed_tensors
from moequant.containers.folders.layouts import LAYOUTS
from moequant.containers.folders.plan import modules, storage
from moequant.containers.folders.storage import AwqIntegers, PackedIntegers
from moequant.errors import MoequantError, PlanError, VerifyError
from tests import models
from tests.containers.folders.cases import folder_of, packed, quantized, released

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""AutoAWQ's `order_map`: the output of its eight that goes into each nibble, lowest first."""


def unpacked(words: np.ndarray) -> np.ndarray:
    """Unsigned codes [rows, out] of int32 words [rows, out / 8], by AutoAWQ's order of packing."""
    rows, count = words.shape
    codes = np.zeros((rows, count * 8), dtype=np.int64)
    for nibble, output in enumerate(ORDER):
        codes[:, output::8] = words.astype(np.int64) >> 4 * nibble & 15
    return codes


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe"])
def test_layout_and_values(tiny, tmp_path: Path, family: str, group: int) -> None:
    """weight[out, in] = (code - zero point) · scale of its group, in float64."""
    model = tiny(family, num_hidden_layers=1)
    made, _ = quantized(model, tmp_path / "a", layout="awq", bits=4, group_size=group)
    quantized(model, tmp_path / "c", bits=4, group_size=group)
    theirs, other = awq.open_folder(tmp_path / "a"), compressed_tensors.open_folder(tmp_path / "c")
    kind = storage(made.checkpoint, made.settings.wanted, "awq")
    other_kind = storage(made.checkpoint, made.settings.wanted, "compressed-tensors")
    assert isinstance(kind, AwqIntegers) and isinstance(other_kind, PackedIntegers)
    quantized_weights = 0
    for weight in made.checkpoint.weights:
        if not theirs.is_quantized(weight):
            assert torch.equal(theirs.load(weight), other.load(weight))
            continue
        quantized_weights += 1
        decoded, (n_out, n_in) = theirs.load(weight), weight.shape[-2:]
        for expert in range(weight.matrices):
            stored = {name: tensor.numpy() for name, tensor in theirs.stored(weight, expert).items()}
            assert {name: (each.dtype.name, each.shape) for name, each in stored.items()} == {
                "qweight": ("int32", (n_in, n_out // 8)),
                "qzeros": ("int32", (n_in // group, n_out // 8)),
                "scales": ("float16", (n_in // group, n_out)),
            }
            codes, zeros = unpacked(stored["qweight"]), unpacked(stored["qzeros"])
            assert (zeros == 8).all() and codes.min() == 0 and codes.max() == 15
            groups = np.arange(n_in) // group
            values = (codes - zeros[groups]) * stored["scales"].astype(np.float64)[groups]
            assert np.array_equal(values.astype(np.float16).T, decoded[expert].numpy())
            ours, scales = other_kind.integers(other.stored(weight, expert), n_in)
            assert np.array_equal(ours.numpy().astype(int) + 8, codes.T), "the same codes"
            assert np.array_equal(scales.double().numpy().T, stored["scales"].astype(np.float64))
            tensors = theirs.stored(weight, expert)
            again = kind.tensors(kind.packed(tensors, n_in), n_in)
            assert all(map(torch.equal, again, map(tensors.__getitem__, kind.suffixes)))
    assert quantized_weights == 3


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3", "qwen2_moe"])
def test_what_stays_is_named(tiny, tmp_path: Path, family: str, attention: bool) -> None:
    """Loaders leave a module as it is when its name has one of the list in it."""
    settings = {"layout": "awq", "quantize_attention": attention, "group_size": 32}
    made, _ = quantized(released(tiny, tmp_path, family), tmp_path / "a", **settings)
    config = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]
    names = config.pop("modules_to_not_convert")
    said = {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "sym": True,
    }
    assert config == said and len(set(names)) == len(names) and "lm_head" in names
    formats = {choice.weight: choice.format for choice in made.plan.choices}
    reader, kept = awq.open_folder(tmp_path / "a"), 0
    for weight in made.checkpoint.weights:
        if len(weight.shape) > 1 and weight.role != "embedding":
            skipped = formats[weight.name] != "W4A16_G32"
            kept += skipped
            for module in modules(weight):
                assert any(name in module for name in names) == skipped, module
                assert (f"{module}.qweight" in reader.files) != skipped
    assert kept >= 2, "a router for each layer"
    if family == "deepseek_v3":
        assert any(name in "model.layers.3.mlp.experts" for name in names), (
            "of the layer that predicts, under vLLM's name of them all"
        )


@pytest.mark.parametrize(
    "changes, settings, message",
    [
        ({}, {"bits": 8}, "--format awq holds W4A16, not W8A16; write --format safetensors"),
        ({}, {"scheme": "NVFP4A16"}, "--format awq holds W4A16, not NVFP4A16"),
        ({}, {"scheme": "W3A16_G32"}, "--format awq holds W4A16, not W3A16_G32"),
        ({}, {"group_size": -1}, "layers.0.experts.gate: vLLM loads no experts in AWQ with one scale a row"),
        ({"moe_intermediate_size": 96}, {}, "does not divide rows of 96; --group-size 32 would work$"),
        (
            {"moe_intermediate_size": 36},
            {},
            "gate: AWQ packs 8 rows at a time, not 36; write --format safetensors",
        ),
        ({}, {"tp": 4}, r"--group-size 128 does not divide rows of 64 \(256 / --tp 4\)"),
        (
            {"hidden_size": 288, "head_dim": 36, "num_key_value_heads": 1},
            {"group_size": 32, "quantize_attention": True},
            "layers.0.attn_k: AWQ packs 8 rows at a time, not 36; write --format safetensors",
        ),
    ],
)
def test_what_awq_cannot_hold(
    tiny, changes: dict[str, int], settings: dict[str, object], message: str
) -> None:
    made = folder_of(tiny("qwen3_moe", **changes), layout="awq", **settings)
    with pytest.raises(PlanError, match=message) as error:
        assert not made.plan
    assert "\n" not in str(error.value)


def test_it_is_told_from_other_layouts(tiny, tmp_path: Path) -> None:
    quantized(tiny("olmoe"), tmp_path / "g", layout="gptq")
    with pytest.raises(VerifyError, match="is gptq, expected awq"):
        awq.open_folder(tmp_path / "g")


@pytest.mark.parametrize("layout", ["awq", "gptq"])
def test_scales_too_small_for_f16_are_told(tiny, tmp_path: Path, layout: str) -> None:
    """f16 has fewer digits below 2^-14, bf16 does not; where all have theirs nothing is said."""
    model = models.build(tmp_path / "model", "qwen3_moe", moe_intermediate_size=128)
    file = model / "model.safetensors"
    tensors = load_file(file)
    faint = "model.layers.1.mlp.experts.5.down_proj.weight"
    tensors[faint] = tensors[faint] * 1e-4
    save_file(tensors, file, {"format": "pt"})
    told = {}
    for name, source, settings in (
        ("small", model, {"layout": layout}),
        ("bf16", model, {}),
        ("usual", tiny("qwen3_moe", moe_intermediate_size=128), {"layout": layout}),
    ):
        made = folder_of(source, **settings)
        told[name] = made.write(empty(tmp_path / name), made.plan, packed(made, [])).notes
    # Rows of 128 in one group: a scale for each of 256 rows, of 16 experts' gate, up (two groups) and down.
    (note,) = told["small"]
    assert note.startswith(
        "256 of 12,288 scales are below 6.1e-05, where F16 has fewer digits, the first in "
    )
    assert f" {faint.removesuffix('weight')}scales; --format safetensors" in note
    assert told["bf16"] == told["usual"] == ()


@pytest.mark.parametrize("layout", ["awq", "gptq"])
def test_what_f16_cannot_hold_is_refused_or_finite(tmp_path: Path, layout: str) -> None:
    """Loaders multiply codes and scales in f16: every product is a number, and larger weights are refused."""
    model = models.build(tmp_path / "model", "qwen3_moe", moe_intermediate_size=128)
    file = model / "model.safetensors"
    tensors = load_file(file)
    large = "model.layers.1.mlp.experts.5.down_proj.weight"
    usual = tensors[large] / tensors[large].float().abs().max()
    for size, holds in ((6.5e4, True), (7e4, False)):
        tensors[large] = (usual * size).bfloat16()
        save_file(tensors, file, {"format": "pt"})
        out = tmp_path / f"{size:g}"
        if not holds:
            with pytest.raises(MoequantError, match="must be finite and within ±65504") as error:
                quantized(model, out, layout=layout)
            assert "\n" not in str(error.value) and not out.exists()
            continue
        made, _ = quantized(model, out, layout=layout)
        (weight,) = (each for each in made.checkpoint.weights if each.name == "layers.1.experts.down")
        values = LAYOUTS[made.settings.layout].open(out).decode(weight, 5)
        assert torch.isfinite(values).all() and values.dtype == torch.float16
        off = (values.double() - tensors[large].double()).norm() / tensors[large].double().norm()
        assert off < 0.2


def empty(folder: Path) -> Path:
    folder.mkdir()
    return folder
