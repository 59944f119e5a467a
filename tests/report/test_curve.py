"""The curve for people: a table with every point, a picture that is the same every time."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from moequant.plan import Budget, curve, points, preset_points, prior_sensitivities
from moequant.plan.curve import Curve
from moequant.report.curve import curve_tables, draw
from tests.plan.test_choose import FACTS, layers


@pytest.fixture(scope="module")
def made() -> Curve:
    weights, sensitivities = layers(), prior_sensitivities(layers(), 2)
    return Curve(
        "a model",
        curve(weights, FACTS, sensitivities, 1000, steps=6),
        points(weights, FACTS, sensitivities, 1000, [Budget.of_size("700k")]),
        preset_points(weights, FACTS, sensitivities, 1000),
        sum(weight.numel for weight in weights),
        "tables",
    )


def test_the_tables_have_every_size(made: Curve) -> None:
    console = Console(file=io.StringIO(), width=120)
    console.print(curve_tables(made))
    text = console.file.getvalue()
    for point in (*made.plans, *made.wanted):
        assert f"{point.file_bytes:,}" in text and f"{point.predicted:.5f}" in text
    assert "at most 700k" in text and "IQ2_XXS" in text and "predicted KL divergence, from tables" in text


def test_a_folder_stands_beside_one_scheme(made: Curve) -> None:
    console = Console(file=io.StringIO(), width=120)
    console.print(curve_tables(replace(made, format="safetensors")))
    text = console.file.getvalue()
    assert "one scheme for all experts" in text and "llama.cpp" not in text


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_the_picture_is_the_same_every_time(made: Curve, tmp_path, kind: str) -> None:
    pytest.importorskip("matplotlib")
    for name in ("one", "two"):
        draw(made, tmp_path / f"{name}.{kind}")
    first = (tmp_path / f"one.{kind}").read_bytes()
    assert first == (tmp_path / f"two.{kind}").read_bytes()
    if kind == "svg":
        assert b"Q4_K_M" in first and b"at most 700k" in first
