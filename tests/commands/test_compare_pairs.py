"""Two real files whose KL divergences are 2 % apart are told apart, though their own errors overlap."""

from __future__ import annotations

from pathlib import Path

import pytest

from moequant.checkpoint import open_checkpoint
from moequant.commands.compare import CompareSettings, run
from moequant.commands.convert import Settings, convert
from moequant.containers.gguf.export import export
from moequant.forward.resources import Resources
from moequant.plan.document import plan_from_types, to_json
from moequant.report.compare import TELLING
from moequant.text import bundled
from tests import models

TYPES = {
    "embedding": "IQ4_XS", "head": "Q5_K", "attn_v": "Q6_K", "attn_out": "Q6_K",
    "0.attn_q": "Q5_K", "0.attn_k": "Q5_K", "1.attn_q": "IQ4_XS", "1.attn_k": "IQ4_XS",
    "0.experts.gate": "IQ3_S", "0.experts.up": "IQ3_S", "0.experts.down": "IQ3_S",
    "1.experts.gate": "IQ4_XS", "1.experts.up": "IQ4_XS", "1.experts.down": "IQ4_XS",
}  # fmt: skip
"""What `moequant plan demo --type Q3_K_M` chose: by weight, or by layer and weight."""


def packed(model: Path, out: Path, **changes: str) -> Path:
    """`model` in TYPES but for `changes`, as `moequant convert --plan` makes it."""
    weights = export(open_checkpoint(model)).weights
    chosen = TYPES | {name.replace("_", ".", 1): type_ for name, type_ in changes.items()}
    types = {}
    for weight in weights:
        name = weight.name.removeprefix("layers.")
        types[weight.name] = chosen.get(name) or chosen.get(name.split(".")[-1]) or "F32"
    plan = out.with_suffix(".json")
    plan.write_text(to_json(plan_from_types(weights, types)), encoding="utf-8")
    convert(
        model, out, Settings(plan=plan, calib_tokens=4096, eval_tokens=0, effort="fast", self_check=False)
    )
    return out


def test_two_percent_are_told_apart(tmp_path: Path) -> None:
    text = models.SHARED / "data" / "eval.txt"
    if not text.is_file():
        pytest.skip(f"{text} is not on this machine")
    demo = bundled.path("demo")
    files = [packed(demo, tmp_path / "one.gguf"), packed(demo, tmp_path / "two.gguf", **{"1_attn_q": "Q5_K"})]
    found = run(demo, files, CompareSettings(text, 8192, resources=Resources(threads=1)))
    one, two = (each.comparison.kl_mean for each in found.measured)
    (apart,) = found.differences
    assert 0.01 < 1 - two.value / one.value < 0.04, "about 2 % less"
    assert one.value - two.value < one.error + two.error, "each alone is not known well enough"
    assert apart.sigmas > TELLING and apart.kl.value < 0
