"""What `inspect` says, held against torch, gguf-py and the files that are really written."""

from __future__ import annotations

import json
import shutil
import struct
import tempfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from moequant.cli import app
from moequant.commands.convert import Settings, convert, open_job
from moequant.containers.gguf.header import Header
from moequant.containers.gguf.presets import BASE_TYPES
from moequant.containers.gguf.read import read_header
from moequant.containers.gguf.roles import role_of as gguf_role
from moequant.errors import CheckpointError
from moequant.inspection import Inspection, inspect
from tests import gguf_shapes, models
from tests.containers.folders.cases import quantized

MOE = ["mixtral", "qwen3_moe", "olmoe"]


@pytest.fixture(scope="module")
def file(tiny, tmp_path_factory: pytest.TempPathFactory):
    """`file("mixtral")`: its F16 GGUF, which needs no calibration."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family) / f"{family}.gguf"
            convert(tiny(family), made[family], Settings("F16", eval_tokens=0))
        return made[family]

    return get


def counted(folder: Path) -> tuple[int, int]:
    """(all, active) parameters as transformers builds the model."""
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    total = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    number = getattr(config, "num_local_experts", None) or config.num_experts
    return total, total - experts + experts * config.num_experts_per_tok // number


@pytest.mark.parametrize("family", MOE)
def test_a_folder_has_the_parameters_that_transformers_builds(tiny, family: str) -> None:
    found = inspect(tiny(family))
    total, active = counted(tiny(family))
    assert (found.parameters, found.active) == (total, active)
    assert found.bytes == 2 * total and found.bits == 16
    assert found.experts == models.CONFIGS[family].get("num_experts", 4)
    assert found.experts_per_token == models.CONFIGS[family]["num_experts_per_tok"]
    assert found.family == family and not found.missing
    assert {role.role for role in found.roles} >= {"expert gate", "expert up", "expert down", "router"}
    assert "other" not in {role.role for role in found.roles}


@pytest.mark.parametrize("family", MOE)
def test_a_gguf_file_has_the_parameters_of_its_folder(tiny, file, family: str) -> None:
    folder, found = inspect(tiny(family)), inspect(file(family))
    assert (found.parameters, found.active) == (folder.parameters, folder.active)
    assert (found.experts, found.experts_per_token) == (folder.experts, folder.experts_per_token)
    assert (found.layers, found.context) == (folder.layers, folder.context)
    assert found.made_by is not None and found.made_by.startswith("moequant ")
    assert found.file_bytes == file(family).stat().st_size
    # The file pads the vocabulary to the embedding.
    assert found.tokenizer.split(", ")[:2] == folder.tokenizer.split(", ")[:2]
    embedding = next(role for role in found.roles if role.role == "embedding")
    experts = sum(role.bytes for role in found.roles if role.role.startswith("expert"))
    share = found.experts_per_token / found.experts
    assert found.active_bytes == round(found.bytes - embedding.bytes - experts * (1 - share))


def test_every_preset_weighs_what_it_says(tiny, tmp_path: Path) -> None:
    """All of them beside what a conversion plans, one beside a file that is written."""
    folder = tiny("qwen3_moe")
    sizes = {preset.name: preset.file_bytes for preset in inspect(folder).presets}
    assert sizes.keys() == BASE_TYPES.keys() - {"F32", "F16"}, "the checkpoint is bf16"
    for name in ("BF16", "Q8_0", "Q4_K_M", "Q2_K"):
        assert sizes[name] == open_job(folder, Settings(name)).size
    out = tmp_path / "bf16.gguf"
    convert(folder, out, Settings("BF16", eval_tokens=0))
    assert out.stat().st_size == sizes["BF16"]


def test_only_headers_are_read(tiny, file, tmp_path: Path) -> None:
    """Behind the headers both are holes."""
    folder = Path(shutil.copytree(tiny("mixtral"), tmp_path / tiny("mixtral").name))  # files hold the name
    weights = folder / "model.safetensors"
    size = weights.stat().st_size
    with weights.open("r+b") as handle:
        handle.truncate(8 + int.from_bytes(weights.read_bytes()[:8], "little"))
        handle.truncate(size)
    assert inspect(folder).presets == inspect(tiny("mixtral")).presets
    shape = {"layers": 94, "hidden": 4096, "heads": 64, "kv": 4, "experts": 128, "used": 8}
    big = gguf_shapes.gqa(tmp_path / "big.gguf", "qwen3moe", **shape, ff=1536, vocab=151936)
    found = inspect(big)
    assert found.file_bytes > 130e9 and big.stat().st_blocks * 512 < 10e6
    assert round(found.parameters / 1e9) == 235 and round(found.active / 1e9) == 22  # Qwen3-235B-A22B


@pytest.mark.parametrize("family", MOE)
def test_the_header_is_what_gguf_py_reads(file, family: str) -> None:
    header, reader = read_header(file(family)), gguf.GGUFReader(file(family))
    theirs = [(t.name, t.tensor_type.name, tuple(map(int, t.shape[::-1])), t.n_bytes) for t in reader.tensors]
    assert [(t.name, t.type, t.shape, t.bytes) for t in header.tensors] == theirs
    for key, field in reader.fields.items():
        if not key.startswith("GGUF."):
            expected = field.contents()
            found = header.array(key) if isinstance(expected, list) else header.metadata[key]
            assert found == expected, key
    assert all(gguf_role(tensor.name) != "other" for tensor in header.tensors)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Five tensors in three shards, written by gguf-py; the first of them."""
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=2)
    writer.add_block_count(1)
    writer.add_array("llama.expert_used_count", [1, 2, 3])
    for i in range(5):
        writer.add_tensor(f"blk.0.t{i}.weight", np.zeros((i + 1, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "m-00001-of-00003.gguf"


def test_shards_are_one_model(shards: Path) -> None:
    header = read_header(shards)
    assert [tensor.shape for tensor in header.tensors] == [(i + 1, 32) for i in range(5)]
    assert header.get("expert_used_count") == (1, 2, 3)
    assert header.file_bytes == sum(path.stat().st_size for path in shards.parent.glob("*.gguf"))
    second = shards.with_name("m-00002-of-00003.gguf")
    with pytest.raises(CheckpointError, match=r"shard 2 of 3; give the first, m-00001-of-00003\.gguf"):
        read_header(second)
    second.unlink()
    with pytest.raises(CheckpointError, match=r"00002-of-00003.*no such file"):
        read_header(shards)


def test_cut_off_and_foreign_files_are_named(file, tmp_path: Path) -> None:
    """A download that stopped anywhere, in the header or behind it, is an error with the file's name."""
    whole = file("mixtral").read_bytes()
    data = len(whole) - sum(tensor.bytes for tensor in read_header(file("mixtral")).tensors)
    cut = tmp_path / "cut.gguf"
    for length in [5, 7, 20, 30, *range(100, data, data // 25), data, len(whole) - 1]:
        cut.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"cut\.gguf"):
            inspect(cut)
    for content, says in ((b"PK\3\4" + b"0" * 60, "not a GGUF"), (b"GGUF" + b"\0\0\0\3" * 9, "version")):
        cut.write_bytes(content)
        with pytest.raises(CheckpointError, match=says):
            inspect(cut)
    with pytest.raises(CheckpointError, match="no such file"):
        inspect(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        inspect(tmp_path)


def test_a_type_of_a_fork_is_said_out_loud(file, tmp_path: Path) -> None:
    raw = bytearray(file("mixtral").read_bytes())
    name = b"blk.0.ffn_up_exps.weight"
    at = raw.index(name) + len(name)
    at += 4 + 8 * struct.unpack_from("<I", raw, at)[0]
    struct.pack_into("<I", raw, at, 141)
    forked = tmp_path / "forked.gguf"
    forked.write_bytes(raw)
    found = inspect(forked)
    assert "type 141" in dict(found.types)
    (llama,) = [runtime for runtime in found.runtimes if runtime.name == "llama.cpp"]
    assert llama.supported is False and "fork" in llama.note


FOREIGN = {
    "qwen2_moe": {
        "intermediate_size": 512, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 256,
        "num_experts": 6, "num_experts_per_tok": 2, "num_key_value_heads": 4,
    },
    "deepseek_v3": {
        "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 128,
        "intermediate_size": 512, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
        "q_lora_rank": 64, "kv_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32,
        "v_head_dim": 32, "num_key_value_heads": 4,
    },
    "granitemoe": {"intermediate_size": 128, "num_local_experts": 6, "num_experts_per_tok": 2},
    "gpt_oss": {
        "intermediate_size": 128, "num_local_experts": 6, "num_experts_per_tok": 2, "head_dim": 64,
    },
}  # fmt: skip
"""Families with shared experts, dense layers, latent attention, fused experts; supported or not."""


@pytest.mark.parametrize("family", FOREIGN)
def test_any_family_is_described(tmp_path: Path, family: str) -> None:
    config = AutoConfig.for_model(family, **(models.COMMON | FOREIGN[family]))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    models.edit_config(tmp_path, architectures=["NoSuchForCausalLM"])
    found = inspect(tmp_path)
    routed = sum(
        p.numel() for name, p in model.named_parameters() if ".experts." in name or "linear.weight" in name
    )
    total = sum(p.numel() for p in model.parameters())
    keys = ("n_routed_experts", "num_experts", "num_local_experts")
    used, experts = config.num_experts_per_tok, next(FOREIGN[family][k] for k in keys if k in FOREIGN[family])
    assert (found.experts, found.experts_per_token) == (experts, used)
    assert abs(found.parameters - total) <= 64, "buffers such as the router's bias may be stored besides"
    assert abs(found.active - (total - routed + routed * used / experts)) <= 64
    assert found.shared_experts == (1 if family in ("qwen2_moe", "deepseek_v3") else None)
    assert "other" not in {role.role for role in found.roles}
    assert found.family is None and not found.presets
    assert "NoSuchForCausalLM" in found.missing[0]
    assert any("tokenizer.json" in reason for reason in found.missing)


def test_layers_that_guess_ahead_are_not_active(tiny, tmp_path: Path) -> None:
    """A checkpoint that keeps its multi-token prediction behind the last layer, as DeepSeek's do."""
    folder = Path(shutil.copytree(tiny("qwen3_moe"), tmp_path / "model"))
    before = inspect(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.experts.0.gate_proj.weight"] = torch.zeros(256, 256)
    tensors["mtp.layers.0.eh_proj.weight"] = torch.zeros(256, 512)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    found = inspect(folder)
    assert found.active == before.active and found.active_bytes == before.active_bytes
    assert found.parameters == before.parameters + 256 * 768
    assert next(role for role in found.roles if role.role == "next token").parameters == 256 * 768


def test_everything_that_is_missing_is_named(tiny, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny("qwen3_moe"), tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    for layer in range(2):
        tensors[f"model.layers.{layer}.mlp.experts.3.surprise"] = torch.zeros(2)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    models.edit_config(folder, norm_topk_prob=False)
    (folder / "tokenizer.json").unlink()
    missing = "\n".join(inspect(folder).missing)
    assert "norm_topk_prob = False" in missing
    assert "model.layers.*.mlp.experts.*.surprise" in missing and missing.count("surprise") == 1
    assert "tokenizer.json" in missing


def test_what_llama_cpp_refuses_is_said(tmp_path: Path) -> None:
    """As `convert` says it before any work: llama.cpp's OLMoE has as many key heads as queries."""
    found = inspect(models.build(tmp_path / "model", "olmoe", num_hidden_layers=1, num_key_value_heads=1))
    (why,) = found.missing
    assert "llama.cpp cannot run a file of this model (" in why and "attn_k_norm" in why
    assert not found.presets


def test_an_unknown_architecture_says_how_it_differs_from_the_nearest(tiny, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny("qwen3_moe"), tmp_path / "model"))
    told = {"architectures": ["Qwen4MoeForCausalLM"], "model_type": "qwen4_moe", "memory_slots": 3}
    models.edit_config(folder, **told)
    tensors = load_file(folder / "model.safetensors")
    for layer in range(2):
        tensors[f"model.layers.{layer}.memory.slots"] = torch.zeros(2)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    missing = inspect(folder).missing
    assert len(missing) <= 10
    assert "Qwen4MoeForCausalLM" in missing[0] and "qwen3_moe (Qwen3MoeForCausalLM)" in missing[0]
    said = "\n".join(missing)
    assert "memory_slots" in said and "model.layers.*.memory.slots" in said and "self_attn" not in said


def test_a_quantized_checkpoint_says_so(tiny, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny("qwen3_moe"), tmp_path / "model"))
    models.edit_config(folder, quantization_config={"quant_method": "strange"})
    found = inspect(folder)
    assert found.made_by == "strange" and any("quantized" in reason for reason in found.missing)


@pytest.mark.parametrize(
    "form",
    ["W4A16", "W8A16", "W8A8", "FP8_DYNAMIC", "MXFP4A16", "NVFP4A16", "fp8", "modelopt", "gptq", "awq"],
)
def test_a_quantized_checkpoint_is_its_model(tiny, tmp_path: Path, form: str) -> None:
    """Scales beside weights are parts of them, and codes stand for all their numbers, whoever wrote them."""
    model, folder = tiny("qwen3_moe", moe_intermediate_size=128), tmp_path / "model"
    if form[0].isupper():
        quantized(model, folder, scheme=form)
    elif form in ("gptq", "awq"):
        quantized(model, folder, scheme="W4A16", layout=form)
    else:
        shutil.copytree(model, folder)
        tensors = load_file(folder / "model.safetensors")
        for name in [name for name in tensors if ".experts." in name]:
            rows, columns = tensors[name].shape
            tensors |= _fp8(name, rows, columns) if form == "fp8" else _nvfp4(name, rows, columns)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        if form == "fp8":
            told = {"quant_method": "fp8", "weight_block_size": [128, 128]}
            models.edit_config(folder, quantization_config=told)
        else:
            said = {
                "producer": {"name": "modelopt"},
                "quantization": {"quant_algo": "NVFP4", "group_size": 16},
            }
            (folder / "hf_quant_config.json").write_text(json.dumps(said))
    found, plain = inspect(folder), inspect(model)
    assert found.missing == () and found.presets
    assert found.made_by == (form if form.islower() else "compressed-tensors")
    assert (found.experts, found.parameters, found.active) == (plain.experts, plain.parameters, plain.active)
    numbers = {role.role: role.parameters for role in found.roles}
    assert numbers.pop("scales") == 0 and numbers == {role.role: role.parameters for role in plain.roles}


def _fp8(name: str, rows: int, columns: int) -> dict[str, torch.Tensor]:
    """A weight as DeepSeek's checkpoints have it."""
    codes = torch.ones(rows, columns).to(torch.float8_e4m3fn)
    return {name: codes, f"{name}_scale_inv": torch.ones(-(-rows // 128), -(-columns // 128))}


def _nvfp4(name: str, rows: int, columns: int) -> dict[str, torch.Tensor]:
    """A weight as ModelOpt's checkpoints have it."""
    return {
        name: torch.ones(rows, columns // 2, dtype=torch.uint8),
        f"{name}_scale": torch.ones(rows, columns // 16).to(torch.float8_e4m3fn),
        f"{name}_scale_2": torch.tensor(0.5),
        name.removesuffix("weight") + "input_scale": torch.tensor(0.5),
    }


def test_a_cut_off_shard_is_named(tiny, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny("qwen3_moe"), tmp_path / "model"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        inspect(folder)


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_a_file_says_what_converting_it_again_needs(tiny, file, tmp_path: Path) -> None:
    alone = shutil.copy(file("olmoe"), tmp_path / "m.gguf")
    (reason,) = inspect(alone).missing
    assert "--config FOLDER" in reason and "--config FOLDER" in run("inspect", alone)[1]
    shutil.copy(tiny("olmoe") / "config.json", tmp_path)
    assert not inspect(alone).missing


def test_the_command(tiny, file) -> None:
    for path in (tiny("olmoe"), file("olmoe")):
        code, shown, _ = run("inspect", path)
        assert code == 0 and "active per token" in shown and "llama.cpp" in shown
        code, plain, _ = run("inspect", path, "--json")
        found = json.loads(plain)
        assert code == 0 and found["experts"] == 8 and found["parameters"] == inspect(path).parameters
        assert found.keys() >= {"active", "active_bytes", "roles", "presets", "missing", "runtimes"}
    code, _, says = run("inspect", "/nowhere")
    assert code == 1 and says.count("\n") == 1 and says.startswith("moequant: ")


def test_a_gguf_file_that_is_no_model(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "i.gguf", "llama")
    writer.add_type("imatrix")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="imatrix"):
        inspect(tmp_path / "i.gguf")


def test_values_are_frozen_and_headers_name_layers(file) -> None:
    header = read_header(file("mixtral"))
    assert isinstance(header, Header) and isinstance(inspect(file("mixtral")), Inspection)
    experts = [tensor for tensor in header.tensors if tensor.is_expert]
    assert [(tensor.layer, tensor.shape[0]) for tensor in experts] == [(0, 4)] * 3 + [(1, 4)] * 3


def test_sizes_need_no_temporary_folder(tiny, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The header is laid out in memory: a full /tmp is no reason to fail."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    with pytest.raises(FileNotFoundError):
        tempfile.mkdtemp()
    found = inspect(tiny("mixtral"))
    out = tmp_path / "bf16.gguf"
    convert(tiny("mixtral"), out, Settings("BF16", eval_tokens=0))
    assert {preset.name: preset.file_bytes for preset in found.presets}["BF16"] == out.stat().st_size
