"""Configs of real releases: none is refused for a key, and each says what the model is."""

from __future__ import annotations

import pytest

from moequant import families
from moequant.containers.gguf.export import check
from moequant.errors import FamilyError
from moequant.families.config import make_config
from tests.families.releases import RELEASES


@pytest.mark.parametrize("name", RELEASES)
def test_a_release_is_read(name: str) -> None:
    """By the family's class in transformers, every key accounted for; llama.cpp computes what it says."""
    told = RELEASES[name]
    family = families.find(told.config)
    assert family.name == told.family
    config = make_config(family, told.config)
    shape = family.shape(config)
    assert (shape.layers, shape.experts, shape.experts_used) == told.size
    assert all(family.layer(config, number) for number in range(shape.layers)) and family.ends(config)
    written = {key.name: key.value for key in check(family, config).keys(config)}
    assert written["block_count"] == shape.layers and written["expert_count"] == shape.experts


def test_a_release_says_its_rotation_where_transformers_5_does_not_look() -> None:
    """DBRX has the base of its rotation beside the other numbers of attention."""
    family = families.find(RELEASES["databricks/dbrx-base"].config)
    config = make_config(family, RELEASES["databricks/dbrx-base"].config)
    written = {key.name: key.value for key in check(family, config).keys(config)}
    assert written["rope.freq_base"] == 500_000 and written["attention.clamp_kqv"] == 8


def test_a_release_says_its_rotations_beside_each_other() -> None:
    """MiMo-V2.5 has another base than V2-Flash, in keys that transformers 5 does not look at."""
    told = RELEASES["XiaomiMiMo/MiMo-V2.5"].config
    config = make_config(families.find(told), told)
    written = {key.name: key.value for key in check(families.find(told), config).keys(config)}
    assert (written["rope.freq_base"], written["rope.freq_base_swa"]) == (1e7, 1e4)
    assert written["rope.dimension_count"] == 64 and written["attention.sliding_window"] == 129
    assert written["attention.head_count_kv"][:6] == [4, 8, 8, 8, 8, 4]


def test_keys_one_level_down_are_accounted_for() -> None:
    told = RELEASES["databricks/dbrx-base"].config
    changed = {**told, "ffn_config": {**told["ffn_config"], "moe_depth": 2}}
    with pytest.raises(FamilyError, match=r"ffn_config\.moe_depth = 2: unknown"):
        make_config(families.find(told), changed)
