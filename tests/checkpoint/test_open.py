"""Reading model folders: the right rows in the right place, and one clear line for every way to be broken."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moequant.checkpoint import load, open_checkpoint, uninterleave
from moequant.errors import CheckpointError, FamilyError
from moequant.values import Role
from tests import models


@pytest.fixture
def broken(tiny, tmp_path: Path) -> Path:
    """A copy of a small Qwen3-MoE folder for a test to damage."""
    return Path(shutil.copytree(tiny("qwen3_moe"), tmp_path / "model"))


@pytest.mark.parametrize("family", models.CONFIGS)
def test_every_weight_equals_the_transformers_parameter(tiny, family: str) -> None:
    folder = tiny(family)
    checkpoint = open_checkpoint(folder)
    params = dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).named_parameters())
    for weight in checkpoint.weights:
        expected = params[weight.param]
        if expected.ndim > 1:
            expected = expected[..., slice(*weight.param_rows), :]
        values = load(weight)
        assert values.shape == weight.shape and values.dtype == torch.bfloat16
        assert torch.equal(uninterleave(values, weight.rope_heads) if weight.rope_heads else values, expected)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe"])
def test_fused_and_per_expert_checkpoints_read_the_same(tiny, family: str) -> None:
    apart = open_checkpoint(tiny(family))
    fused = open_checkpoint(tiny(family, save={"save_original_format": False}))
    assert any(len(weight.sources) == 1 and weight.role is Role.GATE for weight in fused.weights)
    assert [weight.name for weight in apart.weights] == [weight.name for weight in fused.weights]
    for one, other in zip(apart.weights, fused.weights, strict=True):
        assert one.param_rows == other.param_rows
        assert torch.equal(load(one), load(other))


def test_many_shards_read_like_one(tiny) -> None:
    whole = open_checkpoint(tiny("qwen3_moe"))
    sharded = open_checkpoint(tiny("qwen3_moe", save={"max_shard_size": "300KB"}))
    assert len({source.ref.file for weight in sharded.weights for source in weight.sources}) > 3
    for one, other in zip(whole.weights, sharded.weights, strict=True):
        assert torch.equal(load(one), load(other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_source_precision_is_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    checkpoint = open_checkpoint(models.build(tmp_path, "olmoe", dtype=dtype))
    assert {load(weight).dtype for weight in checkpoint.weights} == {dtype}


def test_tied_embeddings_feed_the_head(tiny) -> None:
    checkpoint = open_checkpoint(tiny("qwen3_moe", tie_word_embeddings=True))
    names = {weight.name: weight for weight in checkpoint.weights}
    assert checkpoint.tied and "output.weight" not in names
    assert names["token_embd.weight"].input == "model.norm:out"


def fails(folder: Path, *parts: str, kind: type[Exception] = CheckpointError) -> None:
    with pytest.raises(kind) as caught:
        checkpoint = open_checkpoint(folder)
        for weight in checkpoint.weights:
            load(weight)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert re.search(part, message), message


def test_a_missing_folder_and_a_folder_without_a_model(tmp_path: Path) -> None:
    fails(tmp_path / "nowhere", "no such folder")
    fails(tmp_path, "config.json")


def test_a_missing_shard_is_named(tiny, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny("qwen3_moe", save={"max_shard_size": "300KB"}), tmp_path / "m"))
    gone = sorted(folder.glob("*.safetensors"))[1]
    gone.unlink()
    fails(folder, re.escape(gone.name), "missing")


def test_a_truncated_shard_is_named(broken: Path) -> None:
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    fails(broken, "model.safetensors", "truncated")


@pytest.mark.parametrize(
    "junk", [b"", b"short", b"\xff" * 64, (20).to_bytes(8, "little") + b"{not json............."]
)
def test_a_damaged_header_is_an_error(broken: Path, junk: bytes) -> None:
    (broken / "model.safetensors").write_bytes(junk)
    fails(broken, "model.safetensors")


def test_broken_json_is_an_error(broken: Path) -> None:
    (broken / "config.json").write_text("{")
    fails(broken, "config.json", "JSON")


def rewrite(folder: Path, change) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_missing_experts_are_listed(broken: Path) -> None:
    rewrite(broken, lambda t: [t.pop(f"model.layers.1.mlp.experts.{e}.up_proj.weight") for e in (2, 5)])
    fails(broken, r"layer 1 up", r"\[2, 5\] of 8")


def test_a_missing_tensor_is_named(broken: Path) -> None:
    rewrite(broken, lambda t: t.pop("model.layers.0.self_attn.k_proj.weight"))
    fails(broken, "layer 0", "k_proj")


def test_an_unknown_tensor_is_never_dropped(broken: Path) -> None:
    rewrite(broken, lambda t: t.update({"model.layers.0.mlp.surprise.weight": torch.ones(2, 2)}))
    fails(broken, "surprise", kind=FamilyError)


def test_an_unknown_dtype_is_named(broken: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    rewrite(broken, lambda t: t.update({name: t[name].to(torch.float8_e4m3fn)}))
    fails(broken, "q_proj", "F8_E4M3")


def test_fused_experts_must_match_the_config(tiny, tmp_path: Path) -> None:
    fused = tiny("qwen3_moe", save={"save_original_format": False})
    folder = Path(shutil.copytree(fused, tmp_path / "fused"))
    name = "model.layers.0.mlp.experts.down_proj"
    rewrite(folder, lambda t: t.update({name: t[name][:7].clone()}))
    fails(folder, "layer 0 down", r"\[7, 256, 256\]", "8 experts")


def test_a_single_expert_is_still_a_stack(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(
        models.build(tmp_path, "mixtral", num_local_experts=1, num_experts_per_tok=1)
    )
    down = next(weight for weight in checkpoint.weights if weight.role is Role.DOWN)
    assert load(down).shape == (1, 256, 512)


def test_experts_of_different_shapes_are_refused(broken: Path) -> None:
    rewrite(
        broken, lambda t: t.update({"model.layers.0.mlp.experts.3.down_proj.weight": torch.ones(256, 128)})
    )
    fails(broken, "layer 0 down", "differ")


def test_a_vocabulary_that_disagrees_is_refused(broken: Path) -> None:
    models.edit_config(broken, vocab_size=999)
    fails(broken, "embedding", "999")


def test_a_quantized_checkpoint_is_refused(broken: Path) -> None:
    models.edit_config(broken, quantization_config={"quant_method": "gptq"})
    fails(broken, "already quantized", "gptq")


def test_a_tensor_in_two_shards_is_refused(broken: Path) -> None:
    shutil.copy(broken / "model.safetensors", broken / "other.safetensors")
    fails(broken, "two shards")


def test_the_index_must_match_the_shards(broken: Path) -> None:
    index = {"weight_map": {"ghost.weight": "model.safetensors"}}
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    fails(broken, "ghost.weight", "index")
