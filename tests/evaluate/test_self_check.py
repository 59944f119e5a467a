"""A config that moequant misreads is caught by transformers' own reading of the folder."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moequant.checkpoint import Checkpoint, load, open_checkpoint
from moequant.commands.convert import Settings, convert
from moequant.errors import VerifyError
from moequant.evaluate.self_check import LIMIT, self_check
from moequant.values import Role


def misread(checkpoint: Checkpoint, **values: object) -> Checkpoint:
    """The same folder with config values that it does not have."""
    config = copy.deepcopy(checkpoint.config)
    for key, value in values.items():
        setattr(config, key, value)
    return replace(checkpoint, config=config)


def tied(checkpoint: Checkpoint) -> Checkpoint:
    """The embedding taken for the head, over one that is stored."""
    weights = tuple(weight for weight in checkpoint.weights if weight.role is not Role.OUTPUT)
    shape = replace(checkpoint.shape, tied=True)
    return replace(misread(checkpoint, tie_word_embeddings=True), weights=weights, shape=shape)


def rope(base: float) -> Callable[[Checkpoint], Checkpoint]:
    return lambda one: misread(one, rope_parameters={**one.config.rope_parameters, "rope_theta": base})


PLANTED = {
    "rotary base": rope(500.0),
    "gating": lambda one: misread(one, norm_topk_prob=False),
    "epsilon of norms": lambda one: misread(one, rms_norm_eps=1e-4),
    "tied head over a stored one": tied,
}


@pytest.mark.parametrize("error", PLANTED)
def test_a_planted_error_is_caught(tiny, error: str) -> None:
    checkpoint = PLANTED[error](open_checkpoint(tiny("qwen3_moe")))
    with pytest.raises(VerifyError, match="transformers computes something else"):
        self_check(checkpoint, None)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_a_folder_that_is_read_right_passes(tiny, family: str) -> None:
    checkpoint = open_checkpoint(tiny(family))
    found = self_check(checkpoint, load)
    assert found.source is not None and found.source < LIMIT and found.decoded == found.source


def test_weights_that_are_written_wrong_are_caught(tiny) -> None:
    def doubled(weight: object) -> torch.Tensor:
        values = load(weight)
        return values * 2 if weight.name == "layers.1.experts.down" else values

    with pytest.raises(VerifyError, match="what was written computes something else"):
        self_check(open_checkpoint(tiny("mixtral")), doubled)


def test_too_little_memory_is_said_and_no_error(tiny) -> None:
    found = self_check(open_checkpoint(tiny("mixtral")), None, available=1000)
    assert found.source is None and "GB are needed" in found.note


def test_the_report_says_it_and_the_option_leaves_it_out(tiny, tmp_path: Path, text: Path) -> None:
    given = {"type": "Q4_0", "calib": text, "calib_tokens": 1024, "eval_tokens": 0, "effort": "fast"}
    with_it = convert(tiny("mixtral"), tmp_path / "a.gguf", Settings(**given))
    without = convert(tiny("mixtral"), tmp_path / "b.gguf", Settings(**given, self_check=False))
    assert any("held against transformers" in note for note in with_it.notes)
    assert not any("held against transformers" in note for note in without.notes)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
