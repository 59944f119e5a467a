"""`check` on files as they are made, and on the same files damaged in every way that it must name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from moequant import formats
from moequant.check.damage import expected_error
from moequant.check.figures import CheckReport
from moequant.check.product import IN_TORCH
from moequant.cli import app
from moequant.commands.check import CheckSettings, check
from moequant.commands.convert import Settings, convert
from moequant.errors import VerifyError
from tests.containers.folders.cases import quantized

UP, DOWN = "blk.1.ffn_up_exps.weight", "blk.1.ffn_down_exps.weight"


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory: pytest.TempPathFactory, text: Path) -> Callable[[str, str], Path]:
    """`made("qwen3_moe", "Q4_K_M")`: a file of that model, converted once."""
    folder, known = tmp_path_factory.mktemp("files"), {}

    def get(family: str, type_: str) -> Path:
        if (family, type_) not in known:
            out = folder / f"{family}-{type_}.gguf"
            convert(tiny(family), out, settings(type_, text))
            known[family, type_] = out
        return known[family, type_]

    return get


def settings(type_: str, text: Path) -> Settings:
    return Settings(type=type_, calib=text, calib_tokens=2048, eval_tokens=0, effort="fast")


def against(folder: Path, text: Path, **changes: object) -> CheckSettings:
    return CheckSettings(**({"baseline": folder, "calib": text, "tokens": 1024, "device": "cpu"} | changes))


def edited(file: Path, copy: Path, name: str, edit: Callable[[np.ndarray], None]) -> Path:
    """A copy of a GGUF file, one tensor's bytes u8 [E, out, row_bytes] edited in place."""
    shutil.copyfile(file, copy)
    reader = gguf.GGUFReader(copy, "r+")
    edit(next(tensor.data for tensor in reader.tensors if tensor.name == name))
    reader.data.flush()
    return copy


def swap(data: np.ndarray) -> None:
    data[[2, 5]] = data[[5, 2]]


def double_block(data: np.ndarray) -> None:
    """The f16 d of one Q8_0 block of expert 3, times 2."""
    data[3, 7, 34:36].view(np.float16)[...] *= 2


def double_expert(data: np.ndarray) -> None:
    blocks = data[6].reshape(-1, 34)
    blocks[:, :2] = (blocks[:, :2].copy().view(np.float16) * np.float16(2)).view(np.uint8)


def flip_code(data: np.ndarray) -> None:
    """The highest bit but the sign of one code."""
    data[4, 11, 2 + 34 * 2 + 9] ^= 64


def flip_scale(data: np.ndarray) -> None:
    """A bit of the exponent of one d."""
    data[1, 0, 1] ^= 0x08


def named(report: CheckReport) -> dict[str, str]:
    return {damage.where: damage.what for damage in report.damages}


@pytest.mark.parametrize(("family", "type_"), [("qwen3_moe", "Q4_K_M"), ("olmoe", "Q2_K")])
def test_a_clean_file_holds(tiny, made, text: Path, family: str, type_: str) -> None:
    report = check(made(family, type_), against(tiny(family), text))
    assert report.damages == ()
    assert report.product == IN_TORCH
    assert any("no CUDA device" in note for note in report.notes)
    assert len(report.blocks) == 2
    experts = [e for tensor in report.tensors for e in tensor.experts]
    assert all(expert.same_decoded and expert.kernel_error < 1e-5 for expert in experts)
    seen = [expert for expert in experts if expert.tokens]
    assert len(seen) > len(experts) // 2
    assert all(0.8 < expert.cosine <= 1.00001 for expert in seen)
    assert all(block.local_routing == 1 and block.output_error < block.limit for block in report.blocks)


@pytest.mark.parametrize("type_", ["Q3_K_M", "Q8_0"])
def test_a_file_of_the_trained_model_holds(mix: Path, tmp_path: Path, text: Path, type_: str) -> None:
    out = tmp_path / "mix.gguf"
    convert(mix, out, settings(type_, text))
    report = check(out, against(mix, text))
    assert report.damages == ()
    assert {len(tensor.experts) for tensor in report.tensors} == {1, 8}


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (swap, {2: "holds the weights of expert 5", 5: "holds the weights of expert 2"}),
        (double_block, {3: "row 7, block at column 32"}),
        (double_expert, {6: "weights are 2"}),
        (flip_code, {4: "row 11, column 73"}),
        (flip_scale, {1: "row 0, block at column 0"}),
    ],
)
def test_damage_is_named(tiny, made, text, tmp_path: Path, edit, expected) -> None:
    """From the values alone: whatever checksums may add, the weights give it away."""
    file = edited(made("qwen3_moe", "Q8_0"), tmp_path / "damaged.gguf", UP, edit)
    report = check(file, against(tiny("qwen3_moe"), text))
    by_value = [
        damage for damage in report.damages if "bytes" not in damage.what and "layer" not in damage.where
    ]
    assert {damage.where for damage in by_value} == {f"{UP} expert {expert}" for expert in expected}
    for expert, what in expected.items():
        assert any(d.where == f"{UP} expert {expert}" and what in d.what for d in by_value)


def test_swapped_experts_show_in_the_block(tiny, made, text: Path, tmp_path: Path) -> None:
    file = edited(made("qwen3_moe", "Q8_0"), tmp_path / "damaged.gguf", DOWN, swap)
    report = check(file, against(tiny("qwen3_moe"), text))
    assert "layer 1 MoE block" in named(report)
    assert report.blocks[1].output_error > report.blocks[1].limit
    assert report.blocks[0].output_error < report.blocks[0].limit


def test_without_a_baseline_it_says_what_it_did_not_check(made) -> None:
    report = check(made("qwen3_moe", "Q4_K_M"), CheckSettings(device="cpu", sample=4))
    assert report.holds
    assert len(report.tensors) == 4
    assert any("no --baseline" in note for note in report.notes)
    assert any("4 of " in note for note in report.notes)


@pytest.mark.parametrize(
    ("layout", "settings"),
    [
        ("compressed-tensors", {"bits": 4, "group_size": 64}),
        ("compressed-tensors", {"bits": 8, "group_size": -1, "quantize_attention": True}),
        ("gptq", {"bits": 4, "group_size": 32}),
        ("awq", {"group_size": 64, "quantize_attention": True}),
    ],
)
def test_folders(tiny, text: Path, tmp_path: Path, layout: str, settings: dict[str, object]) -> None:
    """Every layout; `tests/check/test_folders.py` has every scheme."""
    model, out = tiny("olmoe"), tmp_path / "folder"
    quantized(model, out, layout=layout, **settings)
    report = check(out, against(model, text))
    assert report.damages == ()
    assert len(report.blocks) == 2
    assert any(tensor.shape[0] == 8 for tensor in report.tensors)


def test_a_damaged_folder_names_the_module(tiny, text: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model, out = tiny("qwen3_moe"), tmp_path / "folder"
    quantized(model, out, bits=4, group_size=128)
    (file,) = out.glob("*.safetensors")
    stored = load_file(file)
    stored["model.layers.0.mlp.experts.3.up_proj.weight_scale"][5, 1] *= 2
    save_file(stored, file, metadata={"format": "pt"})
    report = check(out, against(model, text))
    (where,) = named(report)
    assert where == "layers.0.experts.up expert 3 (model.layers.0.mlp.experts.3.up_proj)"
    assert "row 5, block at column 128" in named(report)[where]


def test_a_file_of_another_model_is_refused(tiny, made, text: Path, tmp_path: Path) -> None:
    with pytest.raises(VerifyError, match="another model than"):
        check(made("qwen3_moe", "Q8_0"), against(tiny("mixtral"), text))
    with pytest.raises(VerifyError, match="no such file"):
        check(tmp_path / "absent.gguf")
    with pytest.raises(VerifyError, match="is not quantized; give a GGUF file or a quantized folder"):
        check(tiny("olmoe"), CheckSettings(device="cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_refused(made) -> None:
    with pytest.raises(VerifyError, match="no CUDA device"):
        check(made("qwen3_moe", "Q8_0"), CheckSettings(device="cuda"))


def test_the_command(tiny, made, text: Path, tmp_path: Path) -> None:
    """Exit 0 and JSON for a clean file, exit 1 and the expert's name for a damaged one."""
    file = made("qwen3_moe", "Q8_0")
    options = [
        "--baseline",
        str(tiny("qwen3_moe")),
        "--calib",
        str(text),
        "--tokens",
        "1024",
        "--device",
        "cpu",
    ]
    good = CliRunner().invoke(app, ["check", str(file), *options, "--json"])
    assert good.exit_code == 0, good.output
    found = json.loads(good.stdout)
    assert found["holds"] is True
    assert found["versions"]["torch"] == torch.__version__
    assert found["tensors"][0]["experts"][0]["same_decoded"] is True
    bad = edited(file, tmp_path / "bad.gguf", UP, swap)
    failed = CliRunner().invoke(app, ["check", str(bad), *options])
    assert failed.exit_code == 1
    assert f"{UP} expert 2: holds the weights of expert 5" in failed.output


def test_the_kernels_in_the_interpreter(tiny, text: Path, tmp_path: Path) -> None:
    """A process of its own, because Triton decides at import whether it interprets."""
    pytest.importorskip("triton", reason="Triton is not installed")
    out = tmp_path / "q.gguf"
    convert(tiny("qwen3_moe", num_hidden_layers=1, num_experts=2), out, settings("Q4_K_M", text))
    command = ["check", str(out), "--device", "interpreter", "--sample", "4"]
    done = subprocess.run(
        [sys.executable, "-m", "moequant", *command, "--json"],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    errors = [expert["kernel_error"] for tensor in found["tensors"] for expert in tensor["experts"]]
    assert all(0 < error <= 1e-3 for error in errors)
    # What multiplied is said, arithmetic included; nothing falls back to torch.
    products = {tensor["product"] for tensor in found["tensors"]}
    assert all(product.startswith("Triton kernels in its interpreter, ") for product in products)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_K", "Q2_K", "INT4_G128_BF16"])
def test_the_expected_error_is_the_format_s(name: str) -> None:
    weights = torch.randn(32, 1024, generator=torch.Generator().manual_seed(5))
    decoded = formats.dequantize(name, formats.quantize(name, weights, None, "fast"))
    assert expected_error(name) == pytest.approx(float((weights - decoded).norm() / weights.norm()), rel=0.1)
