"""Pinned types: they stand, the rest of the budget is spent around them, and nothing is pinned in silence."""

from __future__ import annotations

import re
from pathlib import Path

import gguf
import pytest

from moequant import formats
from moequant.checkpoint import open_checkpoint
from moequant.containers.gguf.export import export
from moequant.errors import PlanError
from moequant.plan import Budget, aligned, curve, make_plan, pinned, preset_points, prior_sensitivities
from moequant.plan.pins import TYPES
from tests.cli.test_cli import run
from tests.plan.test_choose import FACTS, layers, types

WEIGHTS = layers()
NAMES = {weight.name: f"file.{weight.name}" for weight in WEIGHTS}


def test_the_types_are_those_that_can_be_packed() -> None:
    assert set(formats.FORMATS) == TYPES


@pytest.mark.parametrize("budget", [Budget.of_preset("Q4_K_M"), Budget.of_size("1M"), Budget.of_bpw(4.4)])
def test_pins_stand_and_the_rest_meets_the_budget(budget: Budget) -> None:
    pins = pinned([r"\.0\.experts\.up=q8_0", r"file.*(attn_v|norm)=F16"], WEIGHTS, NAMES)
    assert pins == {"layers.0.experts.up": "Q8_0", "layers.0.attn_v": "F16", "layers.1.attn_v": "F16"}
    known = prior_sensitivities(WEIGHTS, 2)
    free, held = (make_plan(WEIGHTS, budget, FACTS, known, 100, each) for each in ({}, pins))
    assert {name: types(held)[name] for name in pins} == pins
    reasons = {choice.weight: choice.reason for choice in held.choices}
    assert {name for name in reasons if reasons[name] == "pinned by --tensor-type"} == set(pins)
    taken = sum(aligned(choice.bytes) for choice in held.choices)
    assert 0.9 * held.budget < taken <= held.budget == free.budget
    assert sum(aligned(choice.bytes) for choice in free.choices) <= free.budget
    assert types(held)["layers.1.experts.gate"] == types(held)["layers.1.experts.up"]
    assert held.kl is not None and free.kl is not None and held.kl > free.kl


def test_the_first_pin_that_matches_counts() -> None:
    pins = pinned(["1.experts.down=Q6_K", "experts.down=Q3_K"], WEIGHTS, NAMES)
    assert pins == {"layers.0.experts.down": "Q3_K", "layers.1.experts.down": "Q6_K"}


@pytest.mark.parametrize(
    ("pin", "says"),
    [
        ("experts.down", "a pattern and a type were expected"),
        ("=Q6_K", "a pattern and a type were expected"),
        ("experts.down=Q9", "unknown type 'Q9'"),
        ("experts.(=Q6_K", "no regular expression"),
        ("blocks.down=Q6_K", "no weight has such a name; names are like layers.0.experts.gate or, in the"),
        ("router=Q8_0", "layers.0.router: a router stays F32, not Q8_0"),
        ("norm=F16", "stays F32"),
    ],
)
def test_pins_that_cannot_be(pin: str, says: str) -> None:
    with pytest.raises(PlanError, match=re.escape(says)):
        pinned([pin], WEIGHTS, NAMES)


def test_pins_beyond_the_budget() -> None:
    known = prior_sensitivities(WEIGHTS, 2)
    everything = pinned(["experts=Q8_0"], WEIGHTS, NAMES)
    with pytest.raises(PlanError, match=r"pinned by --tensor-type take [\d,]+ bytes alone, [\d,]+ are left"):
        make_plan(WEIGHTS, Budget.of_preset("Q4_K_M"), FACTS, known, 0, everything)
    nearly = pinned([r"experts.(down|up)=Q4_K"], WEIGHTS, NAMES)
    plan = make_plan(WEIGHTS, Budget.of_preset("Q3_K_S"), FACTS, known, 0, nearly)
    assert types(plan)["layers.0.experts.gate"].startswith(("IQ1", "IQ2", "Q2")), "tables yield to pins"
    with pytest.raises(PlanError, match=r"smallest possible file has .*pinned by --tensor-type"):
        make_plan(WEIGHTS, Budget.of_size("620k"), FACTS, known, 0, nearly)


def test_the_curve_keeps_what_is_pinned() -> None:
    known, pins = prior_sensitivities(WEIGHTS, 2), {"layers.0.experts.down": "Q6_K"}
    for point in curve(WEIGHTS, FACTS, known, 1000, 4, pins):
        assert point.plan is not None and types(point.plan)["layers.0.experts.down"] == "Q6_K"
    free, held = (dict(_names(preset_points(WEIGHTS, FACTS, known, 1000, each))) for each in ({}, pins))
    assert 0 < len(held) < len(free), "the smallest presets have no room for it"


def _names(pairs) -> list[tuple[str, int]]:
    return [(theirs.label, ours.file_bytes) for theirs, ours in pairs]


def test_a_file_has_what_is_pinned(tiny, text: Path, tmp_path: Path) -> None:
    model, out = tiny("qwen3_moe", num_hidden_layers=1), tmp_path / "q.gguf"
    name = export(open_checkpoint(model)).names["layers.0.experts.down"]
    pins = "--tensor-type", f"{re.escape(name)}=Q6_K", "--tensor-type", "attn_k=Q4_0"
    options = "convert", model, "-o", out, "--type", "Q4_K_M", "--effort", "fast", *pins
    dry = run(*options, "--dry-run")
    assert dry.returncode == 0 and dry.stdout.count("pinned by --tensor-type") == 2, dry.stdout
    done = run(*options, "--calib", text, "--eval-tokens", 0)
    assert done.returncode == 0, done.stderr
    found = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(out).tensors}
    assert found[name] == "Q6_K" and f"{out.stat().st_size:,} bytes" in dry.stdout
    said = run("plan", model, "--type", "Q4_K_M", "--tensor-type", "nowhere=Q6_K")
    assert said.returncode == 1 and "no weight has such a name" in said.stderr
    for format_, says in (("safetensors", "does not go with --format"), ("gguf", "write the types into p")):
        more = ["--plan", "p.json"] if format_ == "gguf" else ["--format", format_]
        said = run("convert", model, "-o", tmp_path / "x.gguf", "--tensor-type", "a=Q6_K", *more)
        assert said.returncode == 1 and says in said.stderr and len(said.stderr.splitlines()) == 1
