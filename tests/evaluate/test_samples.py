"""Sampling: with what attention and states keep of earlier tokens, a model says what it says without."""

from __future__ import annotations

import pytest
import torch

from moequant.checkpoint import load, open_checkpoint
from moequant.evaluate.samples import sample
from moequant.forward.experts import EXPERTS
from moequant.forward.model import build_model
from moequant.runtimes.llama_cpp.serving import Prompt
from moequant.text.rows import load_encoder

FAMILIES = ["qwen3_moe", "qwen3_vl_moe", "mistral4", "glm5_next", "jamba"]
"""Some are text models on which we put the head."""


@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_at_a_time_is_as_all_at_once(tiny, family: str) -> None:
    checkpoint, prompt = open_checkpoint(tiny(family)), Prompt("p", "def main(): return 1")
    (made,) = sample(checkpoint, load, [prompt], 6)
    model, ids = build_model(checkpoint, EXPERTS, load), load_encoder(checkpoint.path).encode(prompt.text).ids
    with torch.inference_mode():
        for token in made.ids:
            assert token == int(model(torch.tensor([ids])).logits[0, -1].argmax())
            ids.append(token)
