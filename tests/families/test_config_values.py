"""Config values that transformers' classes take, and with which they fail once they compute."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.masking_utils import sliding_window_causal_mask_function

from moequant import families
from moequant.containers.gguf import export
from moequant.errors import CheckpointError, FamilyError
from moequant.families.config import check_groups, make_config
from tests import models


def config(name: str, **changes: object) -> families.Config:
    """Of a tiny model, with other values."""
    family = next(each for each in families.FAMILIES if each.name == name)
    raw = models.config(name).to_dict() | changes
    made = make_config(family, raw)
    check_groups(family, made, 8, 2)
    return made


def fails(name: str, **changes: object) -> bool:
    """Whether the class in transformers does not compute with such a config."""
    made = models.config(name)
    for key, value in changes.items():
        setattr(made, key, value)
    try:
        with torch.inference_mode():
            AutoModelForCausalLM.from_config(made)(torch.ones(1, 9, dtype=torch.int64))
    except (TypeError, KeyError, RuntimeError):
        return True
    return False


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "mellum", "afmoe", "cohere2_moe", "deepseek_v4"])
def test_a_window_of_no_tokens_is_refused(name: str) -> None:
    sees = sliding_window_causal_mask_function(0)
    assert not any(sees(0, 0, torch.tensor(4), torch.tensor(at)) for at in range(9)), "not even itself"
    with pytest.raises(FamilyError, match="config key sliding_window = 0: 1 or more was expected, or null"):
        config(name, sliding_window=0)


def test_a_window_that_no_layer_has_may_be_anything() -> None:
    kinds = {"layer_types": ["full_attention"] * models.config("laguna").num_hidden_layers}
    assert config("laguna", sliding_window=0, **kinds).sliding_window == 0


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("deepseek_v3", {"n_group": None}, "n_group is null"),
        ("deepseek_v3", {"topk_group": None}, "topk_group is null"),
        ("dots1", {"n_group": None}, "n_group is null"),
        ("deepseek_v2", {"n_group": None, "topk_method": "group_limited_greedy"}, "n_group is null"),
        ("deepseek_v2", {"n_group": None, "topk_group": None, "topk_method": "greedy"}, None),
        ("qwen3_moe", {"n_group": None}, None),
    ],
)
def test_groups_that_are_null(name: str, changes: dict[str, object], message: str | None) -> None:
    """Refused where the class counts groups, and nowhere else."""
    assert fails(name, **changes) == (message is not None)
    if message is None:
        assert config(name, **changes)
        return
    with pytest.raises(CheckpointError, match=f"{message}, but this class counts groups of experts; 1 is"):
        config(name, **changes)


def test_one_rotation_where_each_kind_of_layer_has_its_own() -> None:
    flat = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    assert fails("mellum", **flat)
    with pytest.raises(
        FamilyError,
        match=r"key rope_parameters = .*one for each kind of layer was expected, and 'full_attention'",
    ):
        config("mellum", **flat)


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 256}


@pytest.mark.parametrize(
    ("name", "changes", "folder"),
    [
        ("qwen3_moe", {"rope_parameters": {**YARN, "truncate": False}}, True),
        ("qwen3_moe", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "stretch": 2}}, True),
        ("deepseek_v3", {"routed_scaling_factor": 0.0}, True),
        ("granitemoe", {"residual_multiplier": 0.0}, False),  # its experts have no names of their own
        ("qwen3_moe", {"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}}, True),
        ("qwen3_moe", {"rope_parameters": {"rope_type": "bent", "rope_theta": 1e4}}, False),
        ("qwen3_moe", {"rope_parameters": {**YARN, "factor": -1.0}}, False),
        ("qwen3_moe", {"rms_norm_eps": 1e39}, False),
    ],
)
def test_what_only_llama_cpp_cannot_be_told_goes_into_a_folder(
    name: str, changes: dict[str, object], folder: bool
) -> None:
    """What makes no model anywhere does not."""
    family = next(each for each in families.FAMILIES if each.name == name)
    with pytest.raises(FamilyError) as refused:
        export.check(family, config(name, **changes))
    assert str(refused.value).endswith("; --format safetensors writes a folder") == folder
