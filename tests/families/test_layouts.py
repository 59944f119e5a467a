"""Releases that keep the same model in other matrices, under other names: the file is the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moequant.checkpoint import load, open_checkpoint
from moequant.commands.convert import Settings, convert
from moequant.errors import FamilyError
from moequant.evaluate.self_check import self_check
from tests import models

Tensors = Mapping[str, Tensor]


def relaid(
    folder: Path, out: Path, change: Callable[[Tensors], Tensors], config: Mapping[str, object]
) -> Path:
    """The checkpoint with its tensors changed, and keys of its config; None: without the key."""
    out.mkdir(parents=True)
    for file in folder.iterdir():
        if file.suffix == ".safetensors":
            made = {name: each.contiguous().clone() for name, each in change(load_file(file)).items()}
            save_file(made, out / file.name, {"format": "pt"})
        else:
            (out / file.name).write_bytes(file.read_bytes())
    if len(list(out.glob("*.safetensors"))) > 1:
        models.indexed(out)
    raw = json.loads((out / "config.json").read_text()) | config
    kept = {key: value for key, value in raw.items() if value is not None}
    (out / "config.json").write_text(json.dumps(kept))
    return out


def f32(folder: Path, out: Path, text: Path) -> bytes:
    given = {"effort": "fast", "eval_tokens": 0, "self_check": False}
    convert(folder, out, Settings("F32", text, 1024, text, **given))
    return out.read_bytes()


def in_shares(tensors: Tensors, ranks: int = 2) -> Tensors:
    """Queries, keys and values of every layer in one matrix: rank after rank, its share of each."""
    made = {}
    for name, values in tensors.items():
        if name.endswith("self_attn.q_proj.weight"):
            three = [tensors[name.replace("q_proj", f"{each}_proj")].chunk(ranks) for each in "qkv"]
            shares = [part[rank] for rank in range(ranks) for part in three]
            made[name.replace("q_proj", "qkv_proj")] = torch.cat(shares)
        elif not name.endswith(("self_attn.k_proj.weight", "self_attn.v_proj.weight")):
            made[name] = values
    return made


def one_an_expert(tensors: Tensors) -> Tensors:
    """Stacks of gate and up, and of down, as matrices [out, in] of each expert."""
    made = {}
    for name, values in tensors.items():
        module, _, projection = name.rpartition(".")
        if not module.endswith(".experts") or values.ndim != 3:
            made[name] = values
            continue
        turned = values if "feed_forward" not in name else values.transpose(1, 2)  # of Llama 4: [in, out]
        for expert, matrix in enumerate(turned):
            parts = {"down_proj": matrix}
            if projection == "gate_up_proj":
                parts = dict(zip(("gate_proj", "up_proj"), matrix.chunk(2), strict=True))
            made |= {f"{module}.{expert}.{each}.weight": part for each, part in parts.items()}
    return made


@pytest.mark.parametrize("family", ["gemma4", "llama4"])
def test_stacks_of_a_release_one_by_one(tmp_path: Path, text: Path, family: str) -> None:
    """As tools store what they quantize: nvidia's Gemma 4 in NVFP4, Red Hat's Llama 4 in int4."""
    folder = models.as_released(models.build(tmp_path / "whole" / "model", family), family)
    parts = relaid(folder, tmp_path / "parts" / "model", one_an_expert, {})
    stored = load_file(parts / "model.safetensors")
    assert any(".experts.1.up_proj.weight" in name for name in stored)
    assert f32(folder, tmp_path / "whole.gguf", text) == f32(parts, tmp_path / "parts.gguf", text)


@pytest.mark.parametrize("family", ["mixtral", "minimax_m2", "lfm2_moe", "jamba", "nemotron_h"])
def test_experts_under_the_names_of_transformers(tmp_path: Path, family: str) -> None:
    """As llm-compressor stores what it has made linear modules of."""
    folder = models.as_released(models.build(tmp_path / "theirs" / "model", family), family)
    opened, names = open_checkpoint(folder), {}
    for weight in (weight for weight in opened.weights if weight.is_expert):
        module = weight.place.param.rpartition(".")[0]
        kind = f"{weight.role.value}_proj.weight"
        names |= {name: f"{module}.{e}.{kind}" for e, name in enumerate(weight.names)}

    def renamed(tensors: Tensors) -> Tensors:
        return {names.get(name, name): each for name, each in tensors.items()}

    parts = open_checkpoint(relaid(folder, tmp_path / "own" / "model", renamed, {}))
    for one, two in zip(opened.weights, parts.weights, strict=True):
        assert one.name == two.name and torch.equal(load(one), load(two)), one.name
    stored = {each.name for weight in parts.weights if weight.is_expert for each in weight.origin.stored}
    assert stored == set(names.values()) and len(stored) == len(names)


def gpt_oss_one_by_one(tensors: Tensors, at: str = "experts") -> Tensors:
    """As llm-compressor stores them: gate and up apart, each [out, in], with biases."""
    made: dict[str, Tensor] = {}
    for name, values in tensors.items():
        module, _, kind = name.rpartition(".experts.")
        if not module:
            made[name] = values
            continue
        for expert, of in enumerate(values):
            turned, suffix = (of, "bias") if kind.endswith("_bias") else (of.T, "weight")
            gate_up = {"gate_proj": turned[0::2], "up_proj": turned[1::2]}
            parts = gate_up if kind.startswith("gate_up") else {"down_proj": turned}
            made |= {f"{module}.{at}.{expert}.{each}.{suffix}": part for each, part in parts.items()}
    return made


def gpt_oss_in_lists(tensors: Tensors) -> Tensors:
    """As Unsloth stores them: gate and up together, row after row."""
    made: dict[str, Tensor] = {}
    for name, values in tensors.items():
        module, _, kind = name.rpartition(".experts.")
        if not module:
            made[name.replace(".router.", ".router.linear.")] = values
            continue
        parts = f"{kind.removesuffix('_bias')}s"
        for expert, of in enumerate(values):
            turned, suffix = (of, "bias") if kind.endswith("_bias") else (of.T, "weight")
            made[f"{module}.experts.{parts}.{expert}.{suffix}"] = turned
    return made


def gpt_oss_one_by_one_of_old(tensors: Tensors) -> Tensors:
    return gpt_oss_one_by_one(tensors, "experts.experts")


@pytest.mark.parametrize("change", [gpt_oss_one_by_one, gpt_oss_one_by_one_of_old, gpt_oss_in_lists])
def test_gpt_oss_one_by_one(tmp_path: Path, text: Path, change: Callable[[Tensors], Tensors]) -> None:
    """With a bias for each expert."""
    folder = models.build(tmp_path / "whole" / "model", "gpt_oss")
    parts = relaid(folder, tmp_path / "parts" / "model", change, {})
    assert f32(folder, tmp_path / "whole.gguf", text) == f32(parts, tmp_path / "parts.gguf", text)
    asked = Settings(None, text, 1024, text, format="safetensors", scheme="MXFP4A16")
    with pytest.raises(FamilyError, match=r"0.*\.bias: experts are stored one by one, .* write GGUF"):
        convert(parts, tmp_path / "folder", asked)


def of_modelopt(tensors: Tensors) -> Tensors:
    """Stacks in NVFP4, packed along the inputs and stored [E, in, out], as nvidia's Llama 4 has them."""
    made: dict[str, Tensor] = {}
    for name, values in tensors.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            made[name] = values
            continue
        experts, n_in, n_out = values.shape
        made[name] = torch.randint(0, 256, (experts, n_in // 2, n_out), dtype=torch.uint8)
        scale = torch.randint(20, 60, (experts, n_in // 16, n_out), dtype=torch.uint8)
        made[f"{name}_weight_scale"] = scale.view(torch.float8_e4m3fn)
        made[f"{name}_weight_scale_2"] = torch.tensor(0.125)
        made[f"{name}_input_scale"] = torch.tensor(0.01)
    return made


def as_floats(tensors: Tensors) -> Tensors:
    """The same by NVFP4's formula: two codes of e2m1 a byte, the low one first, and both scales."""
    e2m1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    made: dict[str, Tensor] = {}
    for name, values in tensors.items():
        if f"{name}_weight_scale" in tensors:
            codes = torch.stack([values & 15, values >> 4], 2).flatten(1, 2).long()
            scale = tensors[f"{name}_weight_scale"].float().repeat_interleave(16, 1)
            made[name] = e2m1[codes & 7] * (1 - 2 * (codes >> 3)) * scale * tensors[f"{name}_weight_scale_2"]
        elif "_scale" not in name:
            made[name] = values
    return made


NVFP4 = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}}


@pytest.mark.parametrize("family", ["llama4", "gpt_oss"])
def test_stacks_of_modelopt(tmp_path: Path, text: Path, family: str) -> None:
    folder = models.build(tmp_path / "whole" / "model", family)
    torch.manual_seed(0)
    packed = relaid(folder, tmp_path / "packed" / "model", of_modelopt, NVFP4)
    floats = relaid(packed, tmp_path / "floats" / "model", as_floats, {"quantization_config": None})
    assert f32(packed, tmp_path / "packed.gguf", text) == f32(floats, tmp_path / "floats.gguf", text)


MIMO_V2_5 = {
    "architectures": ["MiMoV2ForCausalLM"],
    "model_type": "mimo_v2",
    "attention_projection_layout": "fused_qkv",
    "hybrid_block_size": None,
    "image_token_id": 1,
    "moe_router_dtype": "bfloat16",
    "num_nextn_predict_layers": 3,
    "rope_parameters": {
        "partial_rotary_factor": 0.334,
        "rope_theta": 5000000.0,
        "rope_type": "default",
        "type": "default",
    },
    "vision_config": {"depth": 28},
}
"""What the config of V2.5 says that V2-Flash's does not."""


def test_mimo_in_one_matrix_of_ranks(tmp_path: Path, text: Path) -> None:
    """As V2.5 and V2.6-Flash are released, with the layers that predict."""
    split = models.as_released(models.build(tmp_path / "split" / "model", "mimo_v2_flash"), "mimo_v2_flash")
    one = relaid(split, tmp_path / "one" / "model", in_shares, MIMO_V2_5)
    assert not any("_proj.weight" in name and ".q_" in name for name in load_file(one / "model.safetensors"))
    assert f32(split, tmp_path / "split.gguf", text) == f32(one, tmp_path / "one.gguf", text)


def test_mimo_with_other_heads_in_windows_is_refused(tmp_path: Path) -> None:
    """V2.5-Pro has as many key heads there as elsewhere; transformers' class gives them twice as many."""
    folder = models.as_released(models.build(tmp_path / "model", "mimo_v2_flash"), "mimo_v2_flash")
    models.edit_config(folder, swa_num_key_value_heads=2)
    with pytest.raises(FamilyError, match=r"swa_num_key_value_heads = 2: transformers' class computes 4"):
        open_checkpoint(folder)


def as_paddle(tensors: Tensors) -> Tensors:
    """Matrices as Paddle has them, with inputs as rows, those that multiply the same in one."""
    made = {}
    for name, values in tensors.items():
        ours = name.replace("model.", "ernie.", 1)
        if name.endswith((".k_proj.weight", ".v_proj.weight", ".up_proj.weight")):
            continue
        if name.endswith(".q_proj.weight"):
            three = [tensors[name.replace("q_proj", f"{each}_proj")] for each in "qkv"]
            made[ours.replace("q_proj", "qkv_proj")] = torch.cat(three).T
        elif name.endswith(".gate_proj.weight"):
            both = torch.cat([values, tensors[name.replace("gate_proj", "up_proj")]])
            made[ours.replace("gate_proj", "up_gate_proj")] = both.T
        elif name == "lm_head.weight" or (values.ndim == 2 and ".layers." in name and "statics" not in name):
            made[ours] = values.T
        else:
            made[ours] = values
    return made


PADDLE = {
    "fuse_rope": True,
    "moe_group": "dummy",
    "moe_orthogonal_loss_lambda": 0.01,
    "use_rmsnorm": True,
}
"""What the config of Paddle's releases says besides."""


@pytest.mark.parametrize("tied", [True, False])
def test_ernie_as_paddle_stores_it(tmp_path: Path, text: Path, tied: bool) -> None:
    """From tests of Baidu's own converter and a listing of a release: everything but embedding and norms is
    turned. Queries are as many as there are columns, so no shape of their matrix would tell."""
    folder = models.build(tmp_path / "torch" / "model", "ernie4_5_moe", tie_word_embeddings=tied)
    paddle = relaid(folder, tmp_path / "paddle" / "model", as_paddle, PADDLE)
    assert f32(folder, tmp_path / "torch.gguf", text) == f32(paddle, tmp_path / "paddle.gguf", text)
    found = self_check(open_checkpoint(paddle), None)
    why = "knows no file's names for" if tied else "ignore_mismatched_sizes"  # its head is turned, too
    assert found.source is None and why in found.note
    with pytest.raises(FamilyError, match="is stored with inputs as rows"):
        convert(paddle, tmp_path / "folder", Settings(None, text, 512, text, format="safetensors"))
