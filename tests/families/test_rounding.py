"""Families of every kind through the coupled pass: the model is better for it.

What is fed to whom is tested of every family in `test_conversion`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from moequant.checkpoint import open_checkpoint
from moequant.containers.gguf.export import export
from moequant.rounding.diagonal import Quantizer
from moequant.statistics.calibrate import calibrate
from tests.rounding.test_coupled import QUICK, coupled, kl, rows, types

KINDS = [
    "mixtral", "deepseek_v3", "glm_moe_dsa", "gpt_oss", "qwen3_next", "llama4", "dbrx", "gemma4", "lfm2_moe",
    "nemotron_h_latent", "jamba", "minimax_m3", "hy_v4", "llama",
]  # fmt: skip
"""Families that have unlike attention, experts or states."""

COUNT = {"qwen3_next": 64}
"""Rows of text, 40 where no other is said: what its two layers are fed differs less than the noise of 40."""


@pytest.mark.parametrize("family", KINDS)
def test_a_family_is_rounded_and_better_for_it(tiny, tmp_path: Path, family: str) -> None:
    """Cut as a file is: with rotary rows in llama.cpp's order, and stacks of heads."""
    checkpoint, text = export(open_checkpoint(tiny(family))).checkpoint, rows(count=COUNT.get(family, 40))
    formats = types(checkpoint, "Q4_0")
    made = coupled(checkpoint, text, formats, QUICK, tmp_path)
    quantizer = Quantizer(calibrate(checkpoint, text), "fast")
    plain = {weight.name: quantizer.pack(weight, formats[weight.name]) for weight in checkpoint.weights}
    # These weights are random, so one model's figure says little; measured: 0.74 to 0.92 of the plain search.
    better, usual = kl(checkpoint, rows(9).ids, made, plain)
    assert better < usual
