"""Graphs of two kinds of layers need both: llama.cpp aborts, with the whole program, where one is missing."""

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
