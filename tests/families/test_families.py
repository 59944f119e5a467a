"""Config keys: known ones are translated, harmless ones ignored, everything else refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moequant import families
from moequant.errors import FamilyError
from moequant.families.base import HARMLESS
from tests import models


def config(tiny, family: str, **changes: object) -> dict[str, object]:
    return json.loads((Path(tiny(family)) / "config.json").read_text()) | changes


def written(tiny, family: str, **changes: object) -> dict[str, object]:
    raw = config(tiny, family, **changes)
    found = families.find(raw)
    return {key: value for key, _, value in families.metadata(found, families.normalized(found, raw))}


def test_mixtral_keys(tiny) -> None:
    keys = written(tiny, "mixtral")
    assert keys["llama.expert_count"] == 4 and keys["llama.expert_used_count"] == 2
    assert keys["llama.rope.dimension_count"] == 64 and keys["llama.attention.head_count_kv"] == 2


def test_qwen3_moe_keys(tiny) -> None:
    keys = written(tiny, "qwen3_moe")
    assert keys["qwen3moe.expert_feed_forward_length"] == 256 and keys["qwen3moe.expert_count"] == 8
    assert keys["qwen3moe.attention.key_length"] == 32


def test_old_and_new_rotary_keys_mean_the_same(tiny) -> None:
    old = config(tiny, "mixtral", rope_theta=5e5)
    old.pop("rope_parameters")
    found = families.find(old)
    keys = {key: value for key, _, value in families.metadata(found, families.normalized(found, old))}
    new = written(tiny, "mixtral", rope_parameters={"rope_theta": 5e5, "rope_type": "default"})
    assert keys == new and keys["llama.rope.freq_base"] == 5e5


def test_yarn_is_written(tiny) -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    keys = written(tiny, "qwen3_moe", rope_scaling=scaling)
    assert keys["qwen3moe.rope.scaling.type"] == "yarn" and keys["qwen3moe.rope.scaling.factor"] == 4.0
    assert keys["qwen3moe.rope.scaling.original_context_length"] == 256


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("olmoe", {"norm_topk_prob": True}, "norm_topk_prob"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step"),
        ("mixtral", {"hidden_act": "gelu"}, "hidden_act"),
        ("mixtral", {"sliding_window": 128}, "sliding_window"),
        ("mixtral", {"brand_new_behaviour": 3}, "brand_new_behaviour"),
        ("mixtral", {"rope_scaling": {"type": "longrope", "factor": 2.0}}, "longrope"),
        ("mixtral", {"rope_scaling": {"type": "linear", "factor": 2.0, "odd": 1}}, "odd"),
        ("mixtral", {"rms_norm_eps": None}, "rms_norm_eps"),
    ],
)
def test_behaviour_that_the_runtime_lacks_is_refused(tiny, family: str, changes: dict, named: str) -> None:
    with pytest.raises(FamilyError, match=named):
        written(tiny, family, **changes)


def test_a_window_that_no_context_exceeds_is_harmless(tiny) -> None:
    assert written(tiny, "mixtral", sliding_window=4096)


def test_harmless_keys_are_ignored(tiny) -> None:
    assert written(tiny, "mixtral", **dict.fromkeys(HARMLESS - {"architectures"}, "anything"))


def test_an_unknown_architecture_names_the_known_ones() -> None:
    with pytest.raises(FamilyError, match=r"BertModel.*MixtralForCausalLM"):
        families.find({"architectures": ["BertModel"]})


def test_every_family_has_a_test_model() -> None:
    assert {family.name for family in families.FAMILIES} == set(models.CONFIGS)
