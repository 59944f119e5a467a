"""Files rounded towards corrected targets: whole, they hold; damaged, the expert is named all the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moequant.check.damage import Marks, find
from moequant.check.figures import CheckReport
from moequant.commands.check import CheckSettings, check
from moequant.commands.convert import Settings, convert
from moequant.errors import VerifyError

MODULE = "model.layers.1.mlp.experts.{}.up_proj"

Stored = dict[str, Tensor]


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A tiny Qwen3-MoE in int4, rounded as by default."""
    out = tmp_path_factory.mktemp("folders") / "int4"
    convert(tiny("qwen3_moe"), out, settings(text, format="safetensors", group_size=64))
    return out


def settings(text: Path, **changes: object) -> Settings:
    return replace(Settings(calib=text, calib_tokens=2048, eval_tokens=0), **changes)


def checked(out: Path, model: Path, text: Path) -> CheckReport:
    return check(out, CheckSettings(baseline=model, calib=text, tokens=1024, device="cpu"))


def test_a_whole_folder_holds(tiny, folder: Path, text: Path) -> None:
    report = checked(folder, tiny("qwen3_moe"), text)
    assert report.damages == ()
    assert {tensor.format for tensor in report.tensors} == {"INT4_G64_BF16"}
    assert all(block.output_error < block.limit for block in report.blocks)


def test_a_whole_file_holds_and_its_router_is_looked_at(tiny, tmp_path: Path, text: Path) -> None:
    """At Q8_0 the correction may be several times what rounding loses; the router is not quantized."""
    model, out = tiny("qwen3_moe", num_hidden_layers=1, num_experts=4), tmp_path / "q.gguf"
    convert(model, out, settings(text, type="Q8_0", tensor_type=(".=Q8_0",)))
    report = checked(out, model, text)
    assert report.damages == ()
    router = "blk.0.ffn_gate_inp.weight"
    reader = gguf.GGUFReader(out, "r+")
    next(tensor.data for tensor in reader.tensors if tensor.name == router).view("u1")[3, 8] ^= 1
    reader.data.flush()
    assert (router, "bytes are not those that were written") in pairs(checked(out, model, text))


def pairs(report: CheckReport) -> list[tuple[str, str]]:
    return [(damage.where, damage.what) for damage in report.damages]


def flip_low_bit(stored: Stored) -> None:
    stored[f"{MODULE.format(4)}.weight_packed"][11, 3] ^= 1 << 12


def swap(stored: Stored) -> None:
    for suffix in ("weight_packed", "weight_scale"):
        one, two = (f"{MODULE.format(expert)}.{suffix}" for expert in (2, 5))
        stored[one], stored[two] = stored[two], stored[one]


def double_scale(stored: Stored) -> None:
    stored[f"{MODULE.format(3)}.weight_scale"][5, 1] *= 2


def double_expert(stored: Stored) -> None:
    stored[f"{MODULE.format(6)}.weight_scale"] *= 2


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (flip_low_bit, {4: "bytes are not those that were written"}),
        (swap, {2: "holds the weights of expert 5", 5: "holds the weights of expert 2"}),
        (double_scale, {3: "row 5, block at column 64"}),
        (double_expert, {6: "times the baseline's; a scale is off"}),
    ],
)
def test_damage_is_named(
    tiny, folder: Path, text: Path, tmp_path: Path, edit: Callable[[Stored], None], expected: dict[int, str]
) -> None:
    out = edited(folder, tmp_path / "damaged", edit)
    found = [pair for pair in pairs(checked(out, tiny("qwen3_moe"), text)) if "MoE block" not in pair[0]]
    assert {where for where, _ in found} == {
        f"layers.1.experts.up expert {e} ({MODULE.format(e)})" for e in expected
    }
    for expert, what in expected.items():
        assert any(f"expert {expert} " in where and what in said for where, said in found)


def edited(folder: Path, copy: Path, edit: Callable[[Stored], None]) -> Path:
    shutil.copytree(folder, copy)
    (file,) = copy.glob("*.safetensors")
    stored = load_file(file)
    edit(stored)
    save_file(stored, file, metadata={"format": "pt"})
    return copy


def test_what_was_kept_and_what_is_new_is_looked_at_too(
    tiny, folder: Path, text: Path, tmp_path: Path
) -> None:
    router = "model.layers.0.mlp.gate.weight"

    def edit(stored: Stored) -> None:
        stored[router].view(torch.int16)[2, 7] ^= 1
        stored["model.layers.0.self_attn.k_scale"] = torch.zeros(1)  # of a cache, which no weight needs

    out = edited(folder, tmp_path / "damaged", edit)
    assert pairs(checked(out, tiny("qwen3_moe"), text)) == [
        (router, "bytes are not those that were written"),
        ("model.layers.0.self_attn.k_scale", "was not written by moequant"),
    ]


@pytest.mark.parametrize(
    ("name", "what"), [("gate.bias", "was not written by"), ("gate.weight", "is missing")]
)
def test_a_folder_that_is_no_model_any_more(
    tiny, folder: Path, text: Path, tmp_path: Path, name: str, what: str
) -> None:
    """With tensors that no family knows, or without some: the record says which."""
    name = f"model.layers.0.mlp.{name}"

    def edit(stored: Stored) -> None:
        if stored.pop(name, None) is None:
            stored[name] = torch.zeros(8)

    out = edited(folder, tmp_path / "damaged", edit)
    with pytest.raises(VerifyError, match=f"{name} {what}.*; convert it again"):
        checked(out, tiny("qwen3_moe"), text)


def test_the_record_and_the_config_must_agree(tiny, folder: Path, text: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(folder, tmp_path / "changed"))
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] = 128
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(VerifyError, match="group_size is 128, its weights were written with 64"):
        checked(out, tiny("qwen3_moe"), text)
    (out / "moequant.json").write_text("{}")
    with pytest.raises(VerifyError, match=r"moequant.json: has no checksums of tensors"):
        checked(out, tiny("qwen3_moe"), text)
    (out / "moequant.json").unlink()
    shutil.copyfile(folder / "config.json", out / "config.json")
    report = checked(out, tiny("qwen3_moe"), text)
    assert report.holds and any("records no checksums" in note for note in report.notes)


@pytest.mark.parametrize("vouched", [True, False])
def test_what_a_checksum_vouches_for_is_not_searched_for_flips(vouched: bool) -> None:
    """Correction makes outliers, odd blocks and large errors; it does not make other experts."""
    usual = Marks(0.01, 5.0, 1.0, 0.99, 0.1, 0.2, (0, 0), 1.0, (0.99, 0, 0), (1.01, 0, 0))
    found = [
        usual,
        replace(usual, worst=0.9, worst_at=(3, 4)),
        replace(usual, high_gain=(1.7, 5, 32)),
        replace(usual, error=0.3),
        replace(usual, cosine=0.1),
        replace(usual, gain=2.0),
        replace(usual, cosine=0.05),
        replace(usual, norm=float("nan")),
    ]
    sources = torch.randn(8, 32, 32, generator=torch.Generator().manual_seed(0))
    decoded = sources[[0, 1, 2, 3, 5, 5, 6, 7]]
    decoded[6] = torch.randn(32, 32, generator=torch.Generator().manual_seed(1))
    told = dict(find(found, [vouched] * 8, 0.01, sources, decoded))
    assert told[4].startswith("holds the weights of expert 5") and "2 times" in told[5]
    assert told[6].startswith("holds other weights") and "not finite" in told[7]
    assert told.keys() == ({4, 5, 6, 7} if vouched else set(range(1, 8)))


def test_experts_that_are_alike_are_told_apart() -> None:
    """Experts that began as copies of one have cosines of 0.9: the nearest source is still their own."""
    made = torch.Generator().manual_seed(0)
    sources = torch.randn(1, 64, 64, generator=made) + 0.33 * torch.randn(4, 64, 64, generator=made)
    noisy = sources + 0.1 * torch.randn(4, 64, 64, generator=made)
    usual = Marks(0.1, 60.0, 1.0, 0.99, 0.1, 0.2, (0, 0), 1.0, (0.99, 0, 0), (1.01, 0, 0))
    assert not find([usual] * 4, [True] * 4, 0.1, sources, noisy)
    swapped = [replace(usual, cosine=0.9) if e in (1, 3) else usual for e in range(4)]
    told = find(swapped, [True] * 4, 0.1, sources, noisy[[0, 3, 2, 1]])
    assert [(e, what[:30]) for e, what in told] == [
        (1, "holds the weights of expert 3 "),
        (3, "holds the weights of expert 1 "),
    ]
