"""Routing figures against counts worked out by hand, and properties that hold for any counts."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from moequant import formats
from moequant.checkpoint import open_checkpoint
from moequant.errors import OutputError
from moequant.report.routing import check_picture, heatmap, routing_json, routing_tables
from moequant.rounding.diagonal import Quantizer
from moequant.statistics.calibrate import calibrate
from moequant.statistics.health import coactivation, domain_overlap, health, layer_health, relative_entropy
from moequant.statistics.importance import importance
from moequant.text.corpus import Rows
from moequant.values import Calibration, Role, RouteStats
from tests import models
from tests.statistics import starving


def route(chosen: list[tuple[int, ...]], domains: list[int], experts: int = 4) -> RouteStats:
    """The counts of tokens that chose these experts with even weights, each token of a domain."""
    hot = torch.zeros(len(chosen), experts, dtype=torch.int64)
    for token, picks in enumerate(chosen):
        hot[token, list(picks)] = 1
    by_domain = torch.zeros(max(domains) + 1, experts, dtype=torch.int64)
    by_domain.index_add_(0, torch.tensor(domains), hot)
    k = len(chosen[0])
    entropy = len(chosen) * math.log(k)
    return RouteStats(0, hot.sum(0), hot.sum(0).double() / k, by_domain, hot.T @ hot, entropy)


def calibration(*routes: RouteStats, tokens: int, domains: tuple[str, ...]) -> Calibration:
    return Calibration(routes, {}, 1, tokens, "by hand", domains)


EXAMPLE = route([(0, 1), (0, 1), (0, 2), (0, 2)], [0, 0, 1, 1])


def test_a_layer_by_hand() -> None:
    found = layer_health(EXAMPLE, 4)
    assert (found.imbalance, found.dead, found.starved) == (2.0, (3,), (3,))
    assert found.variation == pytest.approx(math.sqrt((4 + 0 + 0 + 4) / 4) / 2)
    assert found.load_entropy == pytest.approx((0.5 * math.log(2) + 0.5 * math.log(4)) / math.log(4))
    assert found.gate_entropy == pytest.approx(1.0)
    assert found.pair is not None and found.pair.together == pytest.approx(2 / math.sqrt(8))
    assert found.pair.experts == (0, 1)


def test_coactivation_by_hand() -> None:
    together = coactivation(EXAMPLE)
    assert together[0, 2] == pytest.approx(2 / math.sqrt(8)) and together[1, 2] == 0
    assert together.diagonal().tolist() == [1, 1, 1, 0], "the dead expert is with nobody, itself included"
    assert torch.equal(together, together.T)


def test_domains_by_hand() -> None:
    overlap = domain_overlap((EXAMPLE,))
    # Loads (1/2, 1/2, 0, 0) and (1/2, 0, 1/2, 0): half of each is shared.
    assert overlap[0, 1] == pytest.approx(0.5) and overlap.diagonal().tolist() == pytest.approx([1, 1])
    found = health(calibration(EXAMPLE, tokens=4, domains=("prose", "code")))
    prose, code = found.domains
    assert (prose.domain, prose.tokens, prose.nearest, prose.farthest) == (
        "prose", 2, ("code", pytest.approx(0.5)), ("code", pytest.approx(0.5)),
    )  # fmt: skip
    assert prose.favourites == ((0, 1, pytest.approx(2.0)),) and code.favourites[0][1] == 2
    assert [load.expert for load in found.coldest] == [3, 1, 2, 0] and found.hottest[0].tokens == 4


def test_the_same_domain_twice_overlaps_fully_and_disjoint_ones_not_at_all() -> None:
    same = route([(0, 1), (2, 3), (0, 1), (2, 3)], [0, 0, 1, 1])
    apart = route([(0, 1), (0, 1), (2, 3), (2, 3)], [0, 0, 1, 1])
    assert domain_overlap((same,))[0, 1] == pytest.approx(1)
    assert domain_overlap((apart,))[0, 1] == pytest.approx(0, abs=1e-12)


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=16))
def test_bounds_hold_for_any_counts(counts: list[int]) -> None:
    tokens = torch.tensor(counts)
    stats = RouteStats(3, tokens, tokens.double(), tokens[None], torch.diag(tokens), 0.0)
    found = layer_health(stats, max(1, sum(counts)))
    assert 0 <= found.load_entropy <= 1 + 1e-12
    assert found.imbalance <= len(counts) + 1e-9 and (sum(counts) == 0 or found.imbalance >= 1 - 1e-9)
    assert found.variation <= math.sqrt(len(counts) - 1) + 1e-9
    assert set(found.dead) <= set(found.starved) and found.pair is None
    assert len(found.dead) == counts.count(0)


def test_entropy_of_even_and_single_loads() -> None:
    assert relative_entropy(torch.full((8,), 5)) == pytest.approx(1)
    assert relative_entropy(torch.tensor([7, 0, 0])) == 0 == relative_entropy(torch.zeros(4))


def shown(thing) -> str:
    out = io.StringIO()
    Console(file=out, width=120, color_system=None).print(thing)
    return out.getvalue()


@pytest.fixture(scope="module")
def rare(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Calibration]:
    """A real model whose first three experts saw 0, 1 and 2 of 128 tokens."""
    ids = torch.randint(0, models.VOCAB, (2, 64), generator=torch.Generator().manual_seed(1))
    folder = starving.counted(tmp_path_factory.mktemp("rare"), ids, [0, 1, 2])
    return folder, calibrate(open_checkpoint(folder), Rows(ids, ("a", "b"), "random ids", ids.numel()))


def test_experts_with_no_token_one_and_two_are_in_the_tables(rare) -> None:
    _, found = rare
    assert found.routes[0].tokens[:3].tolist() == [0, 1, 2]
    text = shown(routing_tables(health(found)))
    assert "1 expert saw no token (layer.expert): 0.0" in text
    rows = [line.split()[:2] for line in text.splitlines() if line.strip().startswith("0.")]
    assert rows[:3] == [["0.0", "0"], ["0.1", "1"], ["0.2", "2"]]


@pytest.mark.parametrize("gating", ["none", "gate2"])
def test_experts_with_no_token_one_and_two_have_importance_and_are_quantized(rare, gating) -> None:
    folder, found = rare
    quantizer = Quantizer(found, "fast", gating)
    experts = [weight for weight in open_checkpoint(folder).weights if weight.role.is_expert]
    assert {weight.role for weight in experts} == {Role.GATE, Role.UP, Role.DOWN}
    for weight in experts:
        assert weight.site is not None
        columns = importance(found.inputs[weight.site.name], gating)
        assert torch.isfinite(columns).all() and (columns > 0).all()
        packed, loss = quantizer.pack(weight, "Q4_K")
        assert torch.isfinite(loss.error).all() and loss.error.max() < 0.02, loss.error
        decoded = formats.dequantize(formats.get("Q4_K"), packed.data)
        assert (decoded[:3].abs().amax((1, 2)) > 0).all(), "no expert is stored as zeros"


def test_json_has_every_expert(rare) -> None:
    _, found = rare
    value = json.loads(json.dumps(routing_json(health(found), found)))
    (layer,) = value["layers"]
    assert layer["expert_tokens"] == found.routes[0].tokens.tolist() and layer["dead"] == [0]
    assert sum(map(sum, layer["domain_tokens"])) == 256 and value["domain_names"] == ["a", "b"]


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_the_picture_is_complete_and_always_the_same(rare, tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    one, two = tmp_path / f"one{suffix}", tmp_path / f"two{suffix}"
    heatmap(rare[1], one)
    heatmap(rare[1], two)
    assert one.read_bytes() == two.read_bytes()
    assert one.read_bytes().startswith({".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[suffix])
    if suffix == ".svg":
        text = one.read_text()
        assert text.count("×") == 2, "one dead expert, and the title"
        assert "128 routed" in text and "times the fair share" in text


def test_a_picture_of_many_experts_names_no_numbers(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    counts = torch.arange(1, 129)
    routes = tuple(
        RouteStats(layer, counts, counts.double(), counts[None], torch.diag(counts), 0.0)
        for layer in range(60)
    )
    heatmap(calibration(*routes, tokens=int(counts.sum()), domains=("x",)), tmp_path / "p.svg")
    assert (tmp_path / "p.svg").read_text().count("<text") < 120


def test_pictures_of_other_kinds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"p\.gif: pictures are \.png, \.svg, \.pdf"):
        check_picture(tmp_path / "p.gif")
