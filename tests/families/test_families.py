"""Config keys: read as the class in transformers reads them, translated, or refused by name."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from moequant import families
from moequant.checkpoint import open_checkpoint
from moequant.containers.gguf.export import export
from moequant.containers.gguf.families import EXPORTS, OTHERS
from moequant.errors import CheckpointError, FamilyError
from moequant.families.config import GENERATION, HARMLESS, make_config
from tests import models


def raw(tiny, family: str, drop: tuple[str, ...] = (), **changes: object) -> dict[str, Any]:
    """A saved config.json with changes; rotary keys as older releases have them, when one of those is
    changed."""
    found = json.loads((Path(tiny(family)) / "config.json").read_text()) | changes
    if changes.keys() & {"rope_scaling", "rope_theta"}:
        theta = found.pop("rope_parameters", {}).get("rope_theta", 1e4)
        found = {"rope_theta": theta} | found
    return {key: value for key, value in found.items() if key not in drop}


def written(tiny, family: str, drop: tuple[str, ...] = (), **changes: object) -> dict[str, Any]:
    """The keys of the GGUF file of a model with that config."""
    checkpoint = open_checkpoint(tiny(family))
    config = make_config(checkpoint.family, raw(tiny, family, drop, **changes))
    return export(replace(checkpoint, config=config)).metadata


def test_mixtral_keys(tiny) -> None:
    keys = written(tiny, "mixtral")
    assert keys["llama.expert_count"] == 4 and keys["llama.expert_used_count"] == 2
    assert keys["llama.rope.dimension_count"] == 64 and keys["llama.attention.head_count_kv"] == 2


def test_qwen3_moe_keys(tiny) -> None:
    keys = written(tiny, "qwen3_moe")
    assert keys["qwen3moe.expert_feed_forward_length"] == 256 and keys["qwen3moe.expert_count"] == 8
    assert keys["qwen3moe.attention.key_length"] == 32


def test_deepseek_v3_keys(tiny) -> None:
    """llama.cpp's own view of latent attention: one key head, as wide as the latent and the rotated part."""
    keys = {key.removeprefix("deepseek2."): value for key, value in written(tiny, "deepseek_v3").items()}
    assert keys["attention.head_count"] == 4 and keys["attention.head_count_kv"] == 1
    assert (keys["attention.key_length"], keys["attention.value_length"]) == (64 + 16, 64)
    assert (keys["attention.key_length_mla"], keys["attention.value_length_mla"]) == (32 + 16, 48)
    assert (keys["expert_count"], keys["expert_used_count"], keys["expert_shared_count"]) == (8, 3, 2)
    assert (keys["expert_group_count"], keys["expert_group_used_count"]) == (4, 2)
    assert keys["leading_dense_block_count"] == 1 and keys["expert_gating_func"] == 2
    assert keys["rope.scaling.yarn_log_multiplier"] == pytest.approx(0.1)


def test_gpt_oss_keys(tiny) -> None:
    keys = {key.removeprefix("gpt-oss."): value for key, value in written(tiny, "gpt_oss").items()}
    assert keys["attention.sliding_window"] == 48 and keys["expert_feed_forward_length"] == 192
    assert keys["attention.sliding_window_pattern"] == (True, False, True, False)
    assert keys["attention.key_length"] == 32 and keys["rope.scaling.type"] == "yarn"


def test_old_and_new_rotary_keys_mean_the_same(tiny) -> None:
    old = written(tiny, "mixtral", drop=("rope_parameters",), rope_theta=5e5)
    new = written(tiny, "mixtral", rope_parameters={"rope_theta": 5e5, "rope_type": "default"})
    assert old == new and old["llama.rope.freq_base"] == 5e5


@pytest.mark.parametrize("kind", ["type", "rope_type"])
def test_yarn_is_written(tiny, kind: str) -> None:
    scaling = {kind: "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    keys = written(tiny, "qwen3_moe", rope_scaling=scaling)
    assert keys["qwen3moe.rope.scaling.type"] == "yarn" and keys["qwen3moe.rope.scaling.factor"] == 4.0
    assert keys["qwen3moe.rope.scaling.original_context_length"] == 256


@pytest.mark.parametrize(
    ("family", "absent", "key", "value"),
    [
        ("mixtral", "rope_parameters", "llama.rope.freq_base", 1e6),
        ("qwen3", "rope_parameters", "qwen3.rope.freq_base", 1e4),
        ("mixtral", "num_key_value_heads", "llama.attention.head_count_kv", 8),
        ("qwen3", "head_dim", "qwen3.attention.key_length", 128),
        ("mixtral", "head_dim", "llama.attention.key_length", 64),
    ],
)
def test_what_a_config_leaves_out_is_what_its_class_says(tiny, family, absent, key, value) -> None:
    """The values are transformers' own, looked up once by hand."""
    assert written(tiny, family, drop=(absent,))[key] == value


def test_an_absent_key_is_refused_as_its_default_is(tiny) -> None:
    """Qwen3-MoE without norm_topk_prob does not renormalise; llama.cpp's graph always does."""
    assert AutoConfig.for_model("qwen3_moe").norm_topk_prob is False
    with pytest.raises(FamilyError, match="norm_topk_prob = False"):
        written(tiny, "qwen3_moe", drop=("norm_topk_prob",))


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("olmoe", {"norm_topk_prob": True}, "norm_topk_prob"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step"),
        ("qwen3_moe", {"qkv_bias": True}, "qkv_bias"),
        ("qwen3_moe", {"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size"),
        ("mixtral", {"hidden_act": "gelu"}, "hidden_act"),
        ("mixtral", {"sliding_window": 128}, "sliding_window"),
        ("mixtral", {"brand_new_behaviour": 3}, "brand_new_behaviour"),
        ("mixtral", {"is_causal": False}, "is_causal"),
        ("mixtral", {"rope_scaling": {"type": "longrope", "factor": 2.0}}, "longrope|long_factor"),
        ("mixtral", {"rope_scaling": {"type": "linear", "factor": 2.0, "odd": 1}}, "odd"),
        (
            "mixtral",
            {"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 256}},
            "factor",
        ),
        (
            "qwen3_moe",
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "truncate": False}},
            "truncate",
        ),
        ("mixtral", {"rms_norm_eps": None}, "rms_norm_eps"),
        ("mixtral", {"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func"),
        ("deepseek_v3", {"q_lora_rank": None}, "q_lora_rank"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave"),
        ("gpt_oss", {"swiglu_limit": 5.0}, "swiglu_limit"),
        ("mellum", {"sliding_window": None}, "sliding_window is None"),
        ("llama", {"model_type": "qwen3"}, "model_type 'qwen3'"),
        (
            "laguna",
            {"mlp_only_layers": [0, 1]},
            r"mlp_only_layers = \[0, 1\], decoder_sparse_step = 1: mlp_la",
        ),
    ],
)
def test_behaviour_that_the_runtime_lacks_is_refused(tiny, family: str, changes: dict, named: str) -> None:
    with pytest.raises(FamilyError, match=named) as caught:
        written(tiny, family, **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"n_group": 3}, "n_group is 3"),
        ({"n_group": 0}, "n_group is 0"),
        ({"n_group": 8}, "n_group is 8"),
        ({"topk_group": 0}, "topk_group is 0"),
        ({"topk_group": 5}, "topk_group is 5"),
        ({"topk_group": 1}, "topk_group is 1.* 2 to 4 were expected, .* sent to 3 experts"),
    ],
)
def test_groups_that_do_not_hold_the_experts_are_refused(
    tiny, tmp_path: Path, changes: dict, named: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny("deepseek_v3"), folder)
    open_checkpoint(folder)
    models.edit_config(folder, **changes)
    with pytest.raises(CheckpointError, match=named):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        (
            "mixtral",
            {"num_key_value_heads": 3},
            "num_attention_heads = 4: a multiple of num_key_value_heads = 3",
        ),
        (
            "qwen3_next",
            {"linear_num_value_heads": 7},
            "linear_num_value_heads = 7: a multiple of linear_num_key_heads = 2",
        ),
    ],
)
def test_heads_that_share_others_unevenly_are_refused(
    tiny, tmp_path: Path, family: str, changes: dict[str, int], named: str
) -> None:
    """transformers fails on them later, and llama.cpp aborts."""
    folder = tmp_path / "model"
    shutil.copytree(tiny(family), folder)
    models.edit_config(folder, **changes)
    with pytest.raises(FamilyError, match=named):
        open_checkpoint(folder)


def test_key_heads_that_nobody_reads_are_any_number(tiny) -> None:
    """Latent attention makes keys for every query, and llama.cpp sees one."""
    assert written(tiny, "deepseek_v3", num_key_value_heads=128) == written(tiny, "deepseek_v3")
    open_checkpoint(tiny("deepseek_v3", num_key_value_heads=128))


@pytest.mark.parametrize(("family", "key"), [("deepseek_v2", "mlp_bias"), ("deepseek_v4", "mlp_bias")])
def test_biases_that_nobody_describes_are_refused_by_their_key(tiny, family: str, key: str) -> None:
    """The class in transformers has them, and neither releases nor llama.cpp do."""
    with pytest.raises(FamilyError, match=rf"config key {key} = True: only models without .*\.bias \["):
        open_checkpoint(tiny(family, **{key: True}))


def test_keys_that_say_what_the_class_does_anyway_are_taken(tiny) -> None:
    """As the release of Qwen3-Coder-30B-A3B says it."""
    said = {"qkv_bias": False, "shared_expert_intermediate_size": 0, "use_qk_norm": True}
    rest = {"max_window_layers": 28, "rope_scaling": None, "quantization_config": None, "text_config": None}
    changed, plain = (written(tiny, "qwen3_moe", rope_theta=1e4, **more) for more in (said | rest, {}))
    assert changed == plain


def test_a_window_that_no_context_exceeds_is_harmless(tiny) -> None:
    assert written(tiny, "mixtral", sliding_window=4096) == written(tiny, "mixtral")


TYPED: dict[str, object] = {
    "dtype": "float16",
    "torch_dtype": "float16",
    "id2label": {"0": "a", "1": "b"},
    "label2id": {"a": 0, "b": 1},
    "auto_map": {"AutoModel": "modeling_x.X"},
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "attention_dropout": 0.5,
    "router_jitter_noise": 0.1,
    "router_aux_loss_coef": 0.1,
    "initializer_range": 0.1,
    "output_attentions": True,
    "output_hidden_states": True,
    "output_router_logits": True,
    "problem_type": "regression",
    "quantization_config": {"quant_method": "x"},
    "transformers_version": "4.0.0",
    "use_cache": False,
}
"""Values of the types that transformers checks; the other keys take a number."""


def test_harmless_keys_are_ignored(tiny) -> None:
    plain = written(tiny, "mixtral")
    kept = {"unsloth_version": "2026.4.2", "unsloth_fixed": True, "_attn_implementation_autoset": True}
    assert written(tiny, "mixtral", **(dict.fromkeys(HARMLESS, 7) | TYPED | kept)) == plain


def test_how_text_was_to_be_generated_is_ignored(tiny) -> None:
    """transformers 4 wrote it beside the model's own keys; Kimi-K2.5 has all of them."""
    wanted = dict.fromkeys(GENERATION, 2) | {"top_p": 0.5, "temperature": 0.6, "do_sample": True}
    assert written(tiny, "mixtral", **wanted) == written(tiny, "mixtral")


def test_an_unknown_architecture_names_the_nearest() -> None:
    with pytest.raises(FamilyError, match=r"MixtralMoeForCausalLM.*nearest.*mixtral \(MixtralForCausalLM\)"):
        families.find({"architectures": ["MixtralMoeForCausalLM"]})
    for nothing in ({}, {"architectures": None}, {"architectures": []}, {"architectures": [None]}):
        with pytest.raises(FamilyError, match="is not supported yet"):
            families.find(nothing)


def test_encoders_with_decoders_are_refused_as_such() -> None:
    """No decoder is near NLLB."""
    raw = AutoConfig.for_model("nllb-moe").to_dict()
    raw["architectures"] = ["NllbMoeForConditionalGeneration"]
    with pytest.raises(FamilyError, match="has an encoder and a decoder") as caught:
        families.find(raw)
    assert "nearest" not in str(caught.value)


def test_every_family_has_a_test_model_and_a_way_into_gguf_or_a_reason(tiny) -> None:
    every = {family.name for family in families.FAMILIES}
    assert EXPORTS.keys() | OTHERS.keys() == every and not EXPORTS.keys() & OTHERS.keys()
    assert {open_checkpoint(tiny(name)).family.name for name in models.CONFIGS} == EXPORTS.keys()
