"""Folders of every tool under `check`: whole, they hold; damaged, or read otherwise, the expert is named."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from moequant.check.figures import CheckReport
from moequant.check.folder import FolderSource
from moequant.check.product import NO_KERNEL, choose
from moequant.check.source import Entry
from moequant.check.tensors import check_tensor
from moequant.checkpoint import open_checkpoint
from moequant.commands.check import CheckSettings, check
from moequant.commands.compare import CompareSettings
from moequant.commands.compare import run as compare
from moequant.containers.folders.schemes import PRESETS
from moequant.errors import VerifyError
from moequant.kernels import Matrix
from moequant.statistics.calibrate import calibrate
from moequant.values import Calibration
from tests.containers.folders.cases import quantized
from tests.containers.folders.test_inputs import rows
from tests.evaluate import released
from tests.families.test_layouts import relaid

EXPERT = "model.layers.1.mlp.experts.3.up_proj"

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": True}
ASYM = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 64}
PACKED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": ASYM}},
    "ignore": ["re:.*mlp.gate$", "lm_head"],
}
BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


def quark(dtype: str, pack_method: str = "reorder", **more: Any) -> dict[str, Any]:
    every = {"weight": {"dtype": dtype, "qscheme": "per_group", "group_size": 64} | more}
    exported = {"pack_method": pack_method, "weight_format": "real_quantized"}
    return {"quant_method": "quark", "global_quant_config": every, "export": exported}


Form = Callable[[str, Tensor], dict[str, Tensor]]

CASES: dict[str, tuple[Form, dict[str, Any], str, str | None]] = {
    "FP8 of DeepSeek": (released.blocks, BLOCKS, "FP8_B128_F32", None),
    "FP8 of ModelOpt": (
        released.whole("input_scale"),
        {"quant_method": "modelopt", "quant_algo": "FP8"},
        "FP8_W128_F32",
        None,
    ),
    "fbgemm": (released.channels, {"quant_method": "fbgemm_fp8"}, "FP8_G128_F32", None),
    "MXFP8": (released.mx, {"quant_method": "mxfp8"}, "MXFP8", None),
    "NVFP4 of ModelOpt": (
        released.nvfp4,
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        "NVFP4",
        "NVFP4",
    ),
    "GPTQ": (released.gptq(4, 64), GPTQ, "INT4_G64_F16", "INT4"),
    "GPTQ of 3 bits": (released.gptq(3, 32), GPTQ | {"bits": 3, "group_size": 32}, "INT3_G32_F16", "INT4"),
    "GPTQ of 8 bits": (released.gptq(8, 64), GPTQ | {"bits": 8}, "INT8_G64_F16", "INT8"),
    "GPTQ with zero points": (
        released.gptq(4, 64, symmetric=False, version=2),
        GPTQ | {"sym": False, "checkpoint_format": "gptq_v2"},
        "INT4_G64_F16",
        "INT8",
    ),
    "GPTQ by activation order": (
        released.gptq(4, 64, act_order=True),
        GPTQ | {"desc_act": True},
        "INT4_G64_F16",
        None,
    ),
    "AutoRound": (
        released.gptq(4, 64, symmetric=False),
        {"quant_method": "auto-round", "bits": 4, "group_size": 64, "sym": False},
        "INT4_G64_F16",
        "INT8",
    ),
    "AWQ": (
        released.awq,
        {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"},
        "INT4_G64_F16",
        "INT8",
    ),
    "integers of llm-compressor": (released.packed, PACKED, "INT4_G64_F16", "INT8"),
    "uint4 of Quark": (
        released.quark_int(False, False, released.GEMM),
        quark("uint4", symmetric=False),
        "INT4_G64_F16",
        "INT8",
    ),
    "int4 of Quark with zero points": (
        released.quark_int(True, False, tuple(range(8))),
        quark("int4", "order", symmetric=False),
        "INT4_G64_F16",
        "INT8",
    ),
    "int4 of Quark": (
        released.quark_int(True, True, released.GEMM),
        quark("int4", symmetric=True),
        "INT4_G64_F16",
        "INT4",
    ),
    "fp6 of Quark": (
        released.fp6,
        quark("fp6_e3m2", group_size=32, scale_format="e8m0"),
        "MXFP6",
        None,
    ),
}
"""How it is stored, its config, what its numbers are called, and the kernel that takes them."""


SIZES = {"hidden_size": 128, "moe_intermediate_size": 256, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def model(tiny) -> Path:
    """Rows that FP8's squares and groups of 64 divide."""
    return tiny("qwen3_moe", **SIZES)


@pytest.fixture(scope="module")
def calibration(model: Path) -> Calibration:
    """Static scales are made of it."""
    return calibrate(open_checkpoint(model), rows("text"))


def checked(out: Path, model: Path | None, text: Path, **changes: Any) -> CheckReport:
    return check(out, CheckSettings(model, device="cpu", calib=text, tokens=512, **changes))


@pytest.mark.parametrize("name", CASES)
def test_whole_folders_hold(model: Path, text: Path, tmp_path: Path, name: str) -> None:
    form, config, called, kernel = CASES[name]
    out = tmp_path / "out"
    released.release(model, out, form, config)
    report = checked(out, model, text)
    assert report.damages == ()
    assert len(report.tensors) == 2 * 7 and len(report.blocks) == 2, "attention and experts of two layers"
    assert called in {tensor.format for tensor in report.tensors if tensor.name == "layers.1.experts.up"}
    experts = [expert for tensor in report.tensors for expert in tensor.experts]
    assert all(expert.same_decoded and expert.kernel_error < 1e-6 for expert in experts)
    for tensor in report.tensors:
        assert (tensor.product == NO_KERNEL) == (kernel is None)
        for expert in tensor.experts:
            assert expert.weight_error is not None and 0 < expert.weight_error < 1.6 * tensor.expected
    assert any("no kernel of moequant takes" in note for note in report.notes) == (kernel is None)
    source = FolderSource(out, open_checkpoint(model))
    matrices = [source.matrix(entry) for entry in source.entries]
    assert {matrix and matrix.format for matrix in matrices} <= {kernel, "INT4" if kernel else None}
    assert kernel in {matrix and matrix.format for matrix in matrices}


@pytest.mark.parametrize("scheme", PRESETS)
def test_every_scheme_of_ours_holds(
    model: Path, calibration: Calibration, text: Path, tmp_path: Path, scheme: str
) -> None:
    """With and without the model that it was made from."""
    out = tmp_path / "out"
    quantized(model, out, calibration, scheme=scheme, quantize_attention=scheme != "FP8_BLOCK")
    for baseline in (model, None):
        report = checked(out, baseline, text)
        assert report.damages == ()
        assert len(report.blocks) == (2 if baseline else 0)
        assert len(report.tensors) == (2 * 3 if scheme == "FP8_BLOCK" else 2 * 7)
        assert all(expert.same_decoded for tensor in report.tensors for expert in tensor.experts)
        assert not any("records no checksums" in note for note in report.notes)
        assert any("no kernel" in note for note in report.notes) == scheme.startswith("FP8")


@pytest.mark.parametrize(
    ("form", "algorithm", "called"),
    [
        (released.nvfp4, "NVFP4", "NVFP4"),
        (released.channels, "FP8_PER_CHANNEL_PER_TOKEN", "FP8_G128_F32"),
    ],
)
def test_stacks_that_modelopt_turned_hold(
    tiny, text: Path, tmp_path: Path, form: Form, algorithm: str, called: str
) -> None:
    """They are packed as [E, out, in], and stored as [E, in, out]; those of `down` are square."""
    model = tiny("gpt_oss", hidden_size=128, intermediate_size=128, num_hidden_layers=1)

    def stack(parts: list[Tensor]) -> Tensor:
        if parts[0].element_size() > 1:
            return torch.stack(parts)
        return torch.stack([part.contiguous().view(torch.uint8) for part in parts]).view(parts[0].dtype)

    def stacked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        made = dict(tensors)
        for name in (f"model.layers.0.mlp.experts.{each}_proj" for each in ("gate_up", "down")):
            experts = [form(name, weight.T.contiguous()) for weight in made.pop(name)]
            for key in experts[0].keys() - {"input_scale"}:
                parts = [each[key].T if each[key].ndim == 2 else each[key] for each in experts]
                made[name + key.removeprefix("weight").replace("_", "_weight_", 1)] = stack(parts)
        return made

    config = {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["lm_head"]}
    relaid(model, tmp_path / "out", stacked, {"quantization_config": config})
    report = checked(tmp_path / "out", model, text)
    assert report.damages == ()
    assert [tensor.format for tensor in report.tensors] == [called] * 3
    for expert in (expert for tensor in report.tensors for expert in tensor.experts):
        assert expert.same_decoded and expert.weight_error is not None and expert.weight_error > 0


def test_what_a_folder_of_another_tool_has_lost_is_named(model: Path, text: Path, tmp_path: Path) -> None:
    """A scale, a code and two experts that changed places; nothing has a checksum."""
    for name, part in (("GPTQ", "scales"), ("NVFP4 of ModelOpt", "weight_scale_2"), ("AWQ", "scales")):
        out = tmp_path / name
        stored = released.release(model, out, *CASES[name][:2])
        stored[f"{EXPERT}.{part}"] = stored[f"{EXPERT}.{part}"] * 2
        save_file({key: value.contiguous() for key, value in stored.items()}, out / "model.safetensors", PT)
        said = {damage.where: damage.what for damage in checked(out, model, text).damages}
        what = said[f"layers.1.experts.up expert 3 ({EXPERT})"]
        assert re.match("weights are (2|1.9.) times the baseline's; a scale is off", what), name
    out = tmp_path / "FP8"
    stored = released.release(model, out, *CASES["FP8 of DeepSeek"][:2])
    other = EXPERT.replace("3", "6")
    for part in ("weight", "weight_scale_inv"):
        one, two = f"{EXPERT}.{part}", f"{other}.{part}"
        stored[one], stored[two] = stored[two], stored[one]
    stored["model.layers.0.self_attn.q_proj.weight"].view(torch.uint8)[7, 9] = 0x7E  # 448
    save_file(stored, out / "model.safetensors", PT)
    said = {damage.where: damage.what for damage in checked(out, model, text).damages}
    assert "weights of expert 6" in said[f"layers.1.experts.up expert 3 ({EXPERT})"]
    assert "weights of expert 3" in said[f"layers.1.experts.up expert 6 ({other})"]
    assert "row 7, " in said["layers.0.attn_q (model.layers.0.self_attn.q_proj)"]
    assert "layer 1 MoE block" in said


PT = {"format": "pt"}


class Shifted(FolderSource):
    """One whose decoder takes rows for their neighbours."""

    def decode(self, entry: Entry, matrix: Matrix | None) -> Tensor:
        return super().decode(entry, matrix).roll(1, 1)


@pytest.mark.parametrize("name", CASES)
def test_a_decoder_of_ours_that_errs_is_found_out(model: Path, tmp_path: Path, name: str) -> None:
    """The other decoder does not go by ours."""
    out = tmp_path / "out"
    released.release(model, out, *CASES[name][:2])
    product, _ = choose("cpu")
    for kind, holds in ((FolderSource, True), (Shifted, False)):
        source = kind(out, None)
        entry = next(entry for entry in source.entries if entry.stacked)
        figures, damages = check_tensor(source, entry, product, None)
        assert [expert.same_decoded for expert in figures.experts] == [holds] * len(figures.experts)
        assert holds == (not damages)


def test_groups_of_several_formats_hold(model: Path, text: Path, tmp_path: Path) -> None:
    """As llm-compressor mixes them: an expression for all, names before it, and a group for the class."""
    downs = [f"model.layers.{layer}.mlp.experts.{e}.down_proj" for layer in range(2) for e in range(9)]

    def mixed(name: str, weight: Tensor) -> dict[str, Tensor]:
        if name not in downs:
            return released.packed(name, weight)
        parts = released.channels(name, weight)
        return parts | {"weight_scale": parts["weight_scale"][:, None]}

    floats = {"num_bits": 8, "type": "float", "strategy": "channel"}
    groups = {
        "a": {"targets": ["re:.*proj$"], "weights": ASYM, "format": "pack-quantized"},
        "b": {"targets": downs, "weights": floats, "format": "float-quantized"},
        "c": {"targets": ["Linear"], "weights": floats, "format": "float-quantized"},
    }
    out = tmp_path / "out"
    released.release(model, out, mixed, PACKED | {"format": "mixed-precision", "config_groups": groups})
    report = checked(out, model, text)
    assert report.damages == () and report.holds
    formats = {tensor.name: tensor.format for tensor in report.tensors}
    told = {name: formats[f"layers.1.experts.{name}"].split("_")[0] for name in ("gate", "up", "down")}
    assert told == {"gate": "INT4", "up": "INT4", "down": "FP8"}
    (found,) = compare(model, [out], CompareSettings(text, eval_tokens=1024)).measured
    assert 0 < found.comparison.kl_mean.value < 1


@pytest.mark.parametrize("name", ["FP8 of ModelOpt", "AWQ"])
def test_without_a_baseline_and_with_another(
    tiny, model: Path, text: Path, tmp_path: Path, name: str
) -> None:
    out = tmp_path / "out"
    released.release(model, out, *CASES[name][:2])
    report = checked(out, None, text, sample=5)
    assert report.holds and len(report.tensors) == 5 and not report.blocks
    with pytest.raises(VerifyError, match=r"num_hidden_layers is 2, not 3"):
        checked(out, tiny("qwen3_moe", **(SIZES | {"num_hidden_layers": 3})), text)


def test_what_is_declared_and_not_there_is_one_line(model: Path, text: Path, tmp_path: Path) -> None:
    """Weights of an unquantized model under a config that says FP8."""
    out = tmp_path / "out"
    released.release(model, out, lambda name, weight: {"weight": weight}, BLOCKS)
    with pytest.raises(VerifyError, match="is not quantized; give a GGUF file or a quantized folder"):
        checked(out, model, text)
