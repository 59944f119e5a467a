"""DeepSeek-V4: tables of experts, the release's precision, and what llama.cpp does not compute."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moequant.checkpoint import folder_of, load, open_checkpoint
from moequant.commands.check import CheckSettings, check
from moequant.commands.compare import CompareSettings, run
from moequant.commands.convert import Settings, convert
from moequant.containers.folders import compressed_tensors
from moequant.containers.gguf.export import export
from moequant.containers.gguf.families.deepseek4 import DEEPSEEK_V4
from moequant.containers.gguf.source import open_gguf
from moequant.errors import CheckpointError, FamilyError, PlanError, VerifyError
from moequant.forward.experts import EXPERTS
from moequant.forward.model import build_model
from moequant.plan.document import check_fit
from moequant.statistics.calibrate import calibrate
from moequant.values import Role
from tests import models
from tests.clients import transformers_folder
from tests.rounding.test_coupled import rows

TABLES = (0, 1)
"""Layers with a table."""

IDS = torch.randint(1, models.VOCAB, (1, 200), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As it is released, in bf16."""
    made = models.build(tmp_path_factory.mktemp("v4") / "model", "deepseek_v4")
    return models.as_released(made, "deepseek_v4")


def changed(folder: Path, out: Path, change: dict[str, Tensor]) -> Path:
    """The folder with other tensors in some places."""
    out.mkdir(parents=True)
    for file in folder.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    save_file(load_file(folder / "model.safetensors") | change, out / "model.safetensors", {"format": "pt"})
    models.indexed(out)
    return out


def table(folder: Path, layer: int) -> Tensor:
    return load_file(folder / "model.safetensors")[f"layers.{layer}.ffn.gate.tid2eid"]


def exact(folder: Path, out: Path, text: Path) -> bytes:
    given: dict[str, Any] = {"effort": "fast", "eval_tokens": 0, "self_check": False, "overwrite": True}
    convert(folder, out, Settings("F32", text, 1024, text, **given))
    return out.read_bytes()


def test_tokens_go_where_the_table_says(folder: Path) -> None:
    """Counted by the table alone; in the other layers the router chooses."""
    text = rows(count=6)
    found = calibrate(open_checkpoint(folder), text)
    for layer in TABLES:
        expected = torch.bincount(table(folder, layer)[text.ids].flatten(), minlength=8)
        assert torch.equal(found.routes[layer].tokens, expected)
    chosen = {tuple(found.routes[layer].tokens.tolist()) for layer in range(4)}
    assert len(chosen) == 4
    same = replace(text, ids=torch.full_like(text.ids, 7))
    seen = calibrate(open_checkpoint(folder), same).routes
    assert [int((seen[layer].tokens > 0).sum()) for layer in TABLES] == [3, 3]


def test_a_table_is_the_same_in_the_file(folder: Path, tmp_path: Path, text: Path) -> None:
    """Whole numbers, whatever the type; read by gguf-py."""
    out = tmp_path / "q.gguf"
    convert(folder, out, Settings("Q4_K_M", text, 1024, text, effort="fast", eval_tokens=0, self_check=False))
    tensors = {each.name: each for each in gguf.GGUFReader(out).tensors}
    for layer in TABLES:
        found = tensors[f"blk.{layer}.ffn_gate_tid2eid.weight"]
        assert found.tensor_type == gguf.GGMLQuantizationType.I32
        assert np.array_equal(found.data, table(folder, layer).numpy())
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(out.read_bytes())
    place = tensors["blk.1.ffn_gate_tid2eid.weight"].data_offset
    with damaged.open("r+b") as file:
        file.seek(place + 4)
        file.write((8).to_bytes(4, "little"))
    asked = CompareSettings(eval=text, eval_tokens=1024)
    with pytest.raises(VerifyError, match=r"blk\.1\.ffn_gate_tid2eid\.weight has a 8, where 0 to 7 can be"):
        run(folder, [damaged], asked)
    source = open_gguf(replace(folder_of(folder), gguf=damaged))
    with pytest.raises(CheckpointError, match="has a 8, where 0 to 7 can be"):
        [load(weight) for weight in source.weights if weight.role is Role.TABLE]
    report = check(out, CheckSettings(baseline=folder, calib=text, tokens=512))
    assert report.damages == () and len(report.blocks) == 4
    assert all(block.local_routing == 1 for block in report.blocks)


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_either_kind_of_whole_numbers_is_read(
    folder: Path, tmp_path: Path, text: Path, kind: torch.dtype
) -> None:
    change = {f"layers.{layer}.ffn.gate.tid2eid": table(folder, layer).to(kind) for layer in TABLES}
    other = changed(folder, tmp_path / "other" / "model", change)
    tables = [weight for weight in open_checkpoint(other).weights if weight.role is Role.TABLE]
    for layer, weight in enumerate(tables):
        assert torch.equal(load(weight).long(), table(folder, layer))
    if kind == torch.int32:
        assert exact(other, tmp_path / "1.gguf", text) == exact(folder, tmp_path / "2.gguf", text)


def test_a_number_that_is_no_expert_is_an_error(folder: Path, tmp_path: Path, text: Path) -> None:
    for wrong in (8, -1):
        values = table(folder, 1)
        values[17, 2] = wrong
        bad = changed(folder, tmp_path / str(wrong), {"layers.1.ffn.gate.tid2eid": values})
        message = rf"layers\.1\.ffn\.gate\.tid2eid: has a {wrong}, where 0 to 7 can be"
        with pytest.raises(CheckpointError, match=message):
            exact(bad, tmp_path / "bad.gguf", text)
    values = table(folder, 1).float()
    bad = changed(folder, tmp_path / "floats", {"layers.1.ffn.gate.tid2eid": values})
    with pytest.raises(CheckpointError, match="stored as F32; expected I32, I64"):
        open_checkpoint(bad)


def test_a_table_has_one_type(folder: Path) -> None:
    weights = export(open_checkpoint(folder)).weights
    (weight,) = (weight for weight in weights if weight.name == "layers.0.router.table")
    with pytest.raises(PlanError, match="a table stays I32, not Q8_0; write I32"):
        check_fit(weight, "Q8_0", "plan.json")
    check_fit(weight, "I32", "plan.json")


def test_a_folder_loads_in_transformers(folder: Path, tmp_path: Path, text: Path) -> None:
    """Under the release's names, every expert by itself, tables as they are."""
    out = tmp_path / "out"
    given: dict[str, Any] = {"effort": "fast", "calib_tokens": 1024, "eval_tokens": 0, "self_check": False}
    convert(folder, out, Settings(format="safetensors", bits=4, group_size=64, calib=text, **given))
    stored = load_file(out / "model.safetensors")
    assert torch.equal(stored["layers.0.ffn.gate.tid2eid"], table(folder, 0))
    assert "layers.1.ffn.experts.7.w2.weight_packed" in stored
    assert not [name for name in stored if name.startswith("model.")]
    loaded = transformers_folder.load(out)
    ours = build_model(open_checkpoint(folder), EXPERTS, compressed_tensors.open_folder(out).load)
    with torch.inference_mode():
        assert (loaded(IDS).logits - ours(IDS).logits).abs().max() < 1e-4


FP8 = re.compile(r"\.(wq_a|wq_b|wkv|wo_a|wo_b|shared_experts\.w[123])\.weight$")
"""What releases hold in FP8, but for compressors."""


def as_fp8(name: str, values: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """A power of two for 128 x 128, as `.scale`; and the values that this makes."""
    rows, columns = (-(-size // 128) for size in values.shape)
    scale = torch.empty(rows, columns)
    for row in range(rows):
        for column in range(columns):
            part = values[128 * row : 128 * row + 128, 128 * column : 128 * column + 128]
            scale[row, column] = (part.float().abs().max() / 448).log2().ceil().exp2()
    spread = scale.repeat_interleave(128, 0)[: len(values)].repeat_interleave(128, 1)[:, : values.shape[1]]
    codes = (values.float() / spread).to(torch.float8_e4m3fn)
    stored = {name: codes, name.removesuffix("weight") + "scale": scale.to(torch.float8_e8m0fnu)}
    return stored, (codes.float() * spread).bfloat16()


def as_fp4(name: str, values: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Two codes to a byte, a power of two for 32 of a row; and the values that this makes."""
    numbers = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    blocks = values.float().unflatten(1, (-1, 32))
    scale = (blocks.abs().amax(-1, keepdim=True) / 6).log2().ceil().exp2()
    code = ((blocks / scale).abs()[..., None] - numbers).abs().argmin(-1)
    made = (numbers[code] * blocks.sign() * scale).flatten(1).bfloat16()
    code = (code | (blocks < 0).long() << 3).flatten(1).to(torch.uint8)
    packed = (code[:, ::2] | code[:, 1::2] << 4).view(torch.int8)
    stored = {
        name: packed,
        name.removesuffix("weight") + "scale": scale[..., 0].to(torch.float8_e8m0fnu),
    }
    return stored, made


def test_the_precision_of_the_release(folder: Path, tmp_path: Path, text: Path) -> None:
    """FP8 with scales that are powers of two, and experts in FP4: the file has the very same numbers."""
    tensors = load_file(folder / "model.safetensors")
    packed: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    for name, values in tensors.items():
        if not (FP8.search(name) or ".ffn.experts." in name) or "compressor" in name:
            continue
        stored, plain[name] = (as_fp4 if ".ffn.experts." in name else as_fp8)(name, values)
        packed |= stored
    released = changed(folder, tmp_path / "released" / "model", packed)
    kind = {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "activation_scheme": "dynamic"}
    models.edit_config(released, quantization_config={**kind, "weight_block_size": [128, 128]})
    same = changed(folder, tmp_path / "plain" / "model", plain)
    assert exact(released, tmp_path / "1.gguf", text) == exact(same, tmp_path / "2.gguf", text)
    experts = [weight for weight in open_checkpoint(released).weights if weight.is_expert]
    assert experts and {weight.origin.shipped for weight in experts} == {"MXFP4"}


REFUSED = {
    "mlp_layer_types": (["moe", "hash_moe", "moe", "moe"], "tables only before the other layers"),
    "index_head_dim": (96, "index_head_dim = 96: .* needs a multiple of 64"),
    "compress_rates": (
        {"compressed_sparse_attention": 8, "heavily_compressed_attention": 128},
        "compress_rates = .*implements only",
    ),
    "hc_mult": (2, "hc_mult = 2: .*implements only 4"),
    "swiglu_limit": (0.0, "a number above 0 was expected"),
    "o_groups": (3, "o_groups = 3: .* needs a number that divides num_attention_heads = 4"),
    "layer_types": (["heavily_compressed_attention"] * 4, "crashes on a model without a 'compressed_sparse"),
}
"""Config keys of which llama.cpp implements one value."""


@pytest.mark.parametrize("key", REFUSED)
def test_what_llama_cpp_does_not_compute_is_refused(key: str) -> None:
    value, message = REFUSED[key]
    config = models.config("deepseek_v4", **{key: value})
    reasons = list(DEEPSEEK_V4.complaints(config))
    assert len(reasons) == 1 and re.search(message, reasons[0])
    assert not list(DEEPSEEK_V4.complaints(models.config("deepseek_v4")))


def test_bounds_of_yarn_that_llama_cpp_does_not_read_are_told() -> None:
    assert DEEPSEEK_V4.told(models.config("deepseek_v4")) == ()
    (told,) = DEEPSEEK_V4.told(
        models.config("deepseek_v4", rope_parameters=models.YARN | {"beta_fast": 16.0})
    )
    assert "--yarn-beta-fast 16" in told


def test_an_attention_factor_is_refused(folder: Path, tmp_path: Path) -> None:
    out = changed(folder, tmp_path / "out", {})
    raw = json.loads((out / "config.json").read_text())
    models.edit_config(out, rope_scaling=raw["rope_scaling"] | {"attention_factor": 1.2})
    with pytest.raises(FamilyError, match=r"attention_factor 1\.2: llama\.cpp's 'deepseek4' implements"):
        export(open_checkpoint(out))


RED_HAT = {
    "quant_method": "compressed-tensors",
    "format": "mixed-precision",
    "ignore": [],
    "config_groups": {
        "group_0": {
            "targets": ["re:.*attn.*(fused_wqa_wkv|wq_b|wo_a|wo_b)$"],
            "format": "float-quantized",
            "weights": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]},
        },
        "group_1": {
            "targets": ["re:.*ffn.*(gate|up|down)_proj$"],
            "format": "nvfp4-pack-quantized",
            "weights": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
        },
    },
}
"""What the config of RedHatAI/DeepSeek-V4-Flash-NVFP4-FP8 says; its modules have vLLM's names."""


def in_nvfp4_and_fp8(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Experts in NVFP4, attention in FP8 by blocks, and all matrices as floats again."""
    made, floats = dict[str, Tensor](), dict[str, Tensor]()
    for name, values in tensors.items():
        module = name.removesuffix(".weight")
        if re.search(r"ffn\..*\.w[123]$", module):
            codes = torch.randint(0, 256, (len(values), values.shape[1] // 2), dtype=torch.uint8)
            scale = torch.randint(20, 60, (len(values), values.shape[1] // 16), dtype=torch.uint8)
            both = torch.stack([codes & 15, codes >> 4], -1).flatten(1).long()
            e2m1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
            steps = scale.view(torch.float8_e4m3fn).float().repeat_interleave(16, 1)
            floats[name] = e2m1[both & 7] * (1 - 2 * (both >> 3)) * steps / 8
            made[f"{module}.weight_packed"] = codes
            made[f"{module}.weight_scale"] = scale.view(torch.float8_e4m3fn)
            made[f"{module}.weight_global_scale"] = torch.tensor([8.0])
        elif re.search(r"attn\.(wq_a|wkv|wq_b|wo_a|wo_b)$", module):
            codes = values.to(torch.float8_e4m3fn)
            made[name], floats[name] = codes, codes.float() / 2
            blocks = [-(-n // 128) for n in values.shape]
            made[f"{module}.weight_scale"] = torch.full(blocks, 0.5)
        else:
            made[name] = floats[name] = values
    return made, floats


def test_experts_in_nvfp4_and_attention_in_fp8(folder: Path, tmp_path: Path) -> None:
    """As Red Hat released V4 Flash."""
    torch.manual_seed(0)
    made, floats = in_nvfp4_and_fp8(load_file(folder / "model.safetensors"))
    opened = []
    for name, tensors, quantized in (("a", made, RED_HAT), ("b", floats, None)):
        out = changed(folder, tmp_path / name, {})
        save_file(tensors, out / "model.safetensors", {"format": "pt"})
        models.indexed(out)
        models.edit_config(out, quantization_config=quantized)
        opened.append(open_checkpoint(out).weights)
    for one, two in zip(*opened, strict=True):
        assert one.name == two.name and torch.equal(load(one).float(), load(two).float()), one.name
    assert {each.origin.stored[0].codec.name for each in opened[0] if each.is_expert} == {"nvfp4"}


def test_a_group_that_names_other_modules_is_an_error(folder: Path, tmp_path: Path) -> None:
    made, _ = in_nvfp4_and_fp8(load_file(folder / "model.safetensors"))
    out = changed(folder, tmp_path / "out", {})
    save_file(made, out / "model.safetensors", {"format": "pt"})
    models.indexed(out)
    groups = {"group_0": RED_HAT["config_groups"]["group_0"]}
    models.edit_config(out, quantization_config=RED_HAT | {"config_groups": groups})
    with pytest.raises(CheckpointError, match=r"experts.*w\d.* is quantized, but no targets .* name it"):
        open_checkpoint(out)


def test_the_rotation_of_entries_is_said_once_more(folder: Path, tmp_path: Path) -> None:
    """As transformers 5.7 saved it; another than the class makes is refused."""
    out = changed(folder, tmp_path / "out", {})
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "rope_theta": 1e4}
    said = {"rope_theta": 1e4, "rope_parameters": yarn, "compress_rope_theta": 16e4, "rope_scaling": None}
    entries = yarn | {"rope_theta": 16e4}
    models.edit_config(out, **said, compress_rope_parameters=entries)
    found = open_checkpoint(out).config.rope_parameters
    assert found["compress"]["factor"] == 4.0 and found["compress"]["rope_theta"] == 16e4
    models.edit_config(out, compress_rope_parameters=entries | {"factor": 8.0})
    with pytest.raises(FamilyError, match="compress_rope_parameters = "):
        open_checkpoint(out)
