"""Rotary scalings and epsilons in GGUF files: what llama.cpp reads from none is said, by every family."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextRotaryEmbedding

from moequant.commands.convert import Settings, convert
from moequant.containers.gguf.export import check
from moequant.containers.gguf.families import EXPORTS
from moequant.errors import FamilyError
from moequant.families import FAMILIES, Config
from tests import models
from tests.clients.llama import Llama

BOUNDS = models.YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 16.0}
"""YaRN that any family takes, with another bound than llama.cpp's."""

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1 + i / 50 for i in range(32)],
    "long_factor": [1.5 + i / 20 for i in range(32)],
}
"""Other numbers for long texts: llama.cpp takes a context of 512 tokens in these tests, for texts of 256."""


def text_config(family: str, **changes: Any) -> Config:
    """The config of a tiny model's text."""
    given = models.COMMON | models.CONFIGS[family] | changes
    kept = {key: value for key, value in given.items() if value is not models.ABSENT}
    types = {each.name: each.model_type for each in FAMILIES}
    return AutoConfig.for_model(kept.pop("model_type", types.get(family)), **kept)


def scaled(family: str) -> Iterator[Config]:
    """The config with YaRN in the place of its rotation; of each kind of layers, where they differ."""
    found = getattr(text_config(family), "rope_parameters", None) or {}
    kinds = [kind for kind, told in found.items() if isinstance(told, dict)]
    part = {key: found[key] for key in ("partial_rotary_factor", "mrope_section") if key in found}
    for kind in kinds:
        yield text_config(family, rope_parameters=found | {kind: found[kind] | BOUNDS})
    if found and not kinds:
        yield text_config(family, rope_parameters=BOUNDS | part)


@pytest.mark.parametrize("family", models.CONFIGS)
def test_bounds_of_yarn_that_no_graph_reads_are_said(family: str) -> None:
    """Or the scaling is refused. Laguna's release has such bounds, in one of two rotations."""
    for config in scaled(family):
        one = next(each for each in FAMILIES if each.model_type == config.model_type)
        way = EXPORTS[one.name]
        try:
            keys = check(one, config).keys(config)
        except FamilyError:
            continue
        yarn = any(key.name == "rope.scaling.type" and key.value == "yarn" for key in keys)
        assert yarn == any("--yarn-beta-fast 16" in told for told in way.told(config))


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5_moe"])
def test_the_fixed_epsilon_of_delta_nets_is_said(family: str) -> None:
    """transformers norms their queries and keys with 1e-6, llama.cpp with the epsilon of all norms."""
    usual, other = (EXPORTS[family].told(text_config(family, rms_norm_eps=eps)) for eps in (1e-6, 1e-5))
    (told,) = set(other) - set(usual)
    assert "epsilon of 1e-05, transformers with 1e-06" in told


def logits(folder: Path, out: Path, text: Path, ids: torch.Tensor) -> np.ndarray:
    """What llama.cpp computes with the model's F32 file."""
    usual = {"effort": "fast", "eval_tokens": 0, "self_check": False}
    convert(folder, out, Settings("F32", text, 1024, text, **usual))
    with Llama(out, threads=1) as llama:
        return llama.logits(ids.tolist())


UNLIKE = {"mscale": 0.8, "mscale_all_dim": 0.5}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}


@pytest.mark.parametrize(
    ("family", "scaling"),
    [
        ("mixtral", LLAMA3),
        ("exaone_moe", LLAMA3),
        ("qwen3_moe", {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}),
        ("llama", LONGROPE | {"original_max_position_embeddings": 512}),
        ("granitemoe", LONGROPE | {"original_max_position_embeddings": 64}),
        ("deepseek_v3", models.YARN | {"mscale": 0.5, "mscale_all_dim": 1.0}),
        ("deepseek_v3", LINEAR),
        ("glm4_moe_lite", models.YARN),
        ("mistral4", models.CONFIGS["mistral4"]["rope_parameters"] | {"mscale": 0.7, "mscale_all_dim": 0.7}),
        ("glm_moe_dsa", models.YARN | {"mscale_all_dim": 1.0}),
        ("hy_v4", models.YARN | {"attention_factor": 1.3}),
        ("bailing_hybrid", models.YARN),
        ("deepseek_v3", models.YARN | UNLIKE),
        ("deepseek_v2", models.YARN | {"attention_factor": 1.2, "mscale_all_dim": 0.6}),
        ("deepseek_v32", models.YARN | {"mscale": 0.7, "mscale_all_dim": 0.7}),
        ("deepseek_v32", LINEAR | {"mscale_all_dim": 1.0}),
        ("mistral4", models.YARN | UNLIKE | {"llama_4_scaling_beta": 0.1}),
        ("glm_moe_dsa", models.YARN | {"attention_factor": 1.0}),
        ("bailing_hybrid", LINEAR),
    ],
)
def test_scalings_compute_what_transformers_does(
    tmp_path: Path, text: Path, family: str, scaling: dict[str, object]
) -> None:
    folder = models.build(tmp_path / "model", family, rope_parameters=scaling)
    ids = torch.randint(1, models.VOCAB, (256,), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = models.reference(folder)(ids[None]).logits[0].numpy()
    difference = np.abs(logits(folder, tmp_path / "f32.gguf", text, ids) - expected).max(1)
    assert np.quantile(difference, 0.99) < 5e-4


EQUAL = {"mscale": 1.0, "mscale_all_dim": 1.0}
"""YaRN as DeepSeek-V3 has it: attention is scaled, what is rotated is not."""


@pytest.mark.parametrize(
    ("family", "scaling"),
    [
        ("glm_moe_dsa", models.YARN | EQUAL),
        ("glm_moe_dsa", LINEAR),
        ("deepseek_v3", models.YARN | {"factor": 1.0, "attention_factor": 1.3}),
        ("hy_v4", models.YARN | EQUAL),
        ("bailing_hybrid", models.YARN | EQUAL),
        (
            "deepseek_v3",
            {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0, "mscale_all_dim": 1.0},
        ),
    ],
)
def test_a_scale_of_attention_without_a_key_is_refused(family: str, scaling: dict[str, object]) -> None:
    """These graphs scale attention as what is rotated, or not at all."""
    (own,) = (each for each in FAMILIES if each.name == family)
    with pytest.raises(FamilyError, match=r"attention is scaled by 1.*, in llama\.cpp's .* by 1"):
        check(own, text_config(family, rope_parameters=scaling))


def test_numbers_of_longrope_are_one_for_each_frequency() -> None:
    (own,) = (each for each in FAMILIES if each.name == "granitemoe")
    scaling = LONGROPE | {"original_max_position_embeddings": 256}
    config = text_config("granitemoe", rope_parameters=scaling)
    (told,) = check(own, config).told(config)
    assert "where its context is longer than 256 tokens" in told
    with pytest.raises(FamilyError, match="short_factor is 5 numbers; 32 numbers were expected"):
        check(own, text_config("granitemoe", rope_parameters=scaling | {"short_factor": [1.0] * 5}))


def test_a_base_that_transformers_stretches_is_said() -> None:
    """Within the context nothing is scaled; Hunyuan's `alpha` scales once for all."""
    scaling = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    (told,) = EXPORTS["mixtral"].told(text_config("mixtral", rope_parameters=scaling))
    assert "past max_position_embeddings = 1024 tokens" in told
    assert EXPORTS["hunyuan_v1_moe"].told(text_config("hunyuan_v1_moe")) == ()


@pytest.mark.parametrize("kind", ["default", "proportional"])
def test_gemma_rotates_a_part_where_transformers_does(kind: str) -> None:
    """Of the default rotation, transformers' class takes no part."""
    told = {"rope_type": kind, "rope_theta": 1e6, "partial_rotary_factor": 0.25}
    window = {"rope_type": "default", "rope_theta": 1e4}
    rope = {"full_attention": told, "sliding_attention": window}
    config = text_config("gemma4", rope_parameters=rope)
    (factors,) = EXPORTS["gemma4"].computed(config)
    usual = 1e6 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    expected = Gemma4TextRotaryEmbedding(config).full_attention_inv_freq.double()
    assert torch.allclose(usual / torch.tensor(factors.values, dtype=torch.float64), expected, atol=1e-9)


def test_half_a_pair_is_refused() -> None:
    """llama.cpp aborts; transformers rotates one dimension more."""
    (own,) = (each for each in FAMILIES if each.name == "glm4_moe")
    turned = {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.33}
    with pytest.raises(FamilyError, match=r"partial_rotary_factor = 0\.33: 13 of 40 .* rotates pairs"):
        check(own, text_config("glm4_moe", head_dim=40, rope_parameters=turned))


@pytest.mark.parametrize(
    ("family", "sections", "changes"),
    [
        ("qwen3_5_moe", [8, 0, 0], {}),
        ("qwen3_5_moe", [11, 11, 10], {"head_dim": 24}),
        ("qwen3_vl_moe", [7, 5, 4], {}),
    ],
)
def test_text_turns_by_all_frequencies(
    tmp_path: Path, text: Path, family: str, sections: list[int], changes: dict[str, int]
) -> None:
    """Also by those that no section covers, as of Qwen3-VL the last but one; and sections may be more than a
    head has. llama.cpp left the one out and aborted at the other."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections}
    part = {"partial_rotary_factor": 0.25} if family == "qwen3_5_moe" else {}
    rope |= part | {"mrope_interleaved": True}
    folder = models.build(tmp_path / "model", family, rope_parameters=rope, **changes)
    ids = torch.randint(1, models.VOCAB, (96,), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = models.reference(folder)(ids[None]).logits[0].numpy()
    difference = np.abs(logits(folder, tmp_path / "f32.gguf", text, ids) - expected).max(1)
    assert np.quantile(difference, 0.95) < 5e-4


def test_pictures_that_turn_otherwise_are_said() -> None:
    """As of Qwen3-VL: 64 frequencies, of which the class's sections leave two to time."""
    (told,) = EXPORTS["qwen3_vl_moe"].told(text_config("qwen3_vl_moe", head_dim=128, rope_parameters=None))
    assert "in pictures, llama.cpp turns rotary frequencies 61, 62 of 64 with height and width" in told
    config = text_config("qwen3_5_moe", head_dim=256, rope_parameters=None)
    assert EXPORTS["qwen3_5_moe"].told(config) == ()
    (sections,) = (
        each.value for each in EXPORTS["qwen3_5_moe"].keys(config) if each.name == "rope.dimension_sections"
    )
    assert sections == [11, 11, 10, 0], "what the release says"
