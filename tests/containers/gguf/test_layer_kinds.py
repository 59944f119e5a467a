"""What graphs of llama.cpp take for granted: it aborts, with the whole program, or loads no such file."""

from __future__ import annotations

from typing import Any

import pytest

from moequant.containers.gguf.export import check
from moequant.errors import FamilyError
from moequant.families import FAMILIES
from tests.containers.gguf.test_rotations import text_config

FULL = "full_attention"

ALIKE: dict[str, list[dict[str, Any]]] = {
    "qwen3_next": [{"layer_types": [kind] * 2} for kind in (FULL, "linear_attention")],
    "qwen3_5_moe": [{"layer_types": [kind] * 2} for kind in (FULL, "linear_attention")],
    "granitemoehybrid": [{"layer_types": [kind] * 3} for kind in (FULL, "linear_attention")],
    "lfm2_moe": [{"layer_types": [kind] * 4} for kind in (FULL, "conv")],
    "nemotron_h": [{"layers_block_type": [kind, "moe"]} for kind in (FULL, "linear_attention")],
    "jamba": [{"attn_layer_period": 8, "attn_layer_offset": 7}],
    "gpt_oss": [{"layer_types": [FULL] * 4}],
    "gemma4": [{"layer_types": [FULL] * 2}],
    "granitemoe_swa": [{"layer_types": [FULL] * 4}, {"layer_rope_theta": [0] * 4}],
}
"""Changes of configs that leave one kind: with a state, with a window, or without a rotation."""


@pytest.mark.parametrize(("family", "changes"), [(name, each) for name in ALIKE for each in ALIKE[name]])
def test_layers_of_one_kind_are_refused(family: str, changes: dict[str, Any]) -> None:
    (own,) = (each for each in FAMILIES if each.name == family)
    check(own, text_config(family))
    with pytest.raises(FamilyError, match=r"config key \w+: llama\.cpp's '[-\w]+' needs layers with"):
        check(own, text_config(family, **changes))


@pytest.mark.parametrize(("family", "key"), [("llama4", "attention_bias"), ("granitemoehybrid", "conv_bias")])
def test_biases_without_a_place_are_refused(family: str, key: str) -> None:
    """llama.cpp counts tensors that it does not know, and crashes without one that it does."""
    (own,) = (each for each in FAMILIES if each.name == family)
    changes = {"attention_bias": True} if key == "attention_bias" else {"mamba_conv_bias": False}
    with pytest.raises(FamilyError, match=key):
        check(own, text_config(family, **changes))


def test_lagunas_first_layer_looks_at_everything() -> None:
    """Its part of each head is rotated in all layers that do: seen in llama.cpp's source, and in logits."""
    (own,) = (each for each in FAMILIES if each.name == "laguna")
    kinds = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    with pytest.raises(FamilyError, match="rotates as much of each head"):
        check(own, text_config("laguna", layer_types=kinds))


@pytest.mark.parametrize("family", ["deepseek_v32", "glm_moe_dsa", "deepseek_v4"])
def test_indexers_that_are_not_turned_whole_are_refused(family: str) -> None:
    """llama.cpp aborts at the first token."""
    (own,) = (each for each in FAMILIES if each.name == family)
    check(own, text_config(family, index_head_dim=128))
    with pytest.raises(FamilyError, match=r"index_head_dim = 96: .* needs a multiple of 64"):
        check(own, text_config(family, index_head_dim=96))


TAKEN = {
    "qwen2_moe": {"head_dim": 40},
    "olmoe": {"num_attention_heads": 6, "num_key_value_heads": 3},
    "jamba": {"head_dim": 128},
    "lfm2_moe": {"head_dim": 24},
}
"""Heads that are not as wide as the stream in all, of graphs whose loader wants a square."""


@pytest.mark.parametrize("family", TAKEN)
def test_heads_that_are_not_as_wide_as_the_stream_are_refused(family: str) -> None:
    (own,) = (each for each in FAMILIES if each.name == family)
    with pytest.raises(
        FamilyError, match=r"num_attention_heads = \d and head_dim = \d+: .* hidden_size = 256"
    ):
        check(own, text_config(family, **TAKEN[family]))


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("deepseek_v3", {"routed_scaling_factor": 0.0}, "expert_weights_scale would be 0"),
        ("cohere2_moe", {"logit_scale": 0.0}, "logit_scale would be 0"),
        ("granitemoe", {"residual_multiplier": 0.0}, "residual_scale would be 0"),
        ("cohere2_moe", {"rms_norm_eps": 0.0}, "rms_norm_eps = 0"),
        ("cohere2_moe", {"sliding_window": None}, "sliding_window is None"),
        ("lfm2_moe", {"conv_L_cache": 1}, "conv_L_cache = 1"),
    ],
)
def test_numbers_that_llama_cpp_takes_for_none_are_refused(family: str, changes: dict, named: str) -> None:
    """It left a factor of 0 out, took another norm, or failed to begin."""
    (own,) = (each for each in FAMILIES if each.name == family)
    with pytest.raises(FamilyError, match=named):
        check(own, text_config(family, **changes))


def test_dense_layers_that_all_have_a_window_need_no_pattern() -> None:
    """llama.cpp rotates dense layers, whatever they see; transformers, by a pattern, those with a window."""
    (own,) = (each for each in FAMILIES if each.name == "cohere2_moe")
    dense = {"first_k_dense_replace": 2, "prefix_dense_sliding_window_pattern": 9}
    check(own, text_config("cohere2_moe", **dense))
    with pytest.raises(FamilyError, match="prefix_dense_sliding_window_pattern = 2"):
        check(own, text_config("cohere2_moe", **dense | {"prefix_dense_sliding_window_pattern": 2}))
