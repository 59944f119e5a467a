"""Feeding starved experts: the plan's arithmetic, and the whole loop on a model that routes by domain."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from moequant.checkpoint import Checkpoint, open_checkpoint
from moequant.statistics.calibrate import calibrate
from moequant.statistics.coverage import choose, cover, rates, starved, take, target_tokens
from moequant.text.corpus import Rows
from moequant.values import RouteStats
from tests import models
from tests.statistics import starving

LENGTH = 32


def route(by_domain: list[list[int]], layer: int = 0) -> RouteStats:
    counts = torch.tensor(by_domain)
    tokens = counts.sum(0)
    return RouteStats(layer, tokens, tokens.double(), counts, torch.diag(tokens), 0.0)


def test_the_target_is_a_multiple_of_the_fair_share() -> None:
    layer = route([[10, 20, 30, 40], [0, 0, 0, 0]])
    assert target_tokens([layer], 1.0) == 25 and target_tokens([layer], 0.1) == 3
    assert [(one.expert, one.tokens) for one in starved([layer], 25)] == [(0, 10), (1, 20)]
    assert target_tokens([], 1.0) == 0 and not starved([layer], 0)


def test_rates_are_the_domains_own_where_much_was_seen() -> None:
    layer = route([[900_000, 100_000], [0, 1_000_000]])
    found = rates([layer], [1_000_000, 1_000_000])
    torch.testing.assert_close(
        found, torch.tensor([[0.9, 0.1], [0.0, 1.0]], dtype=torch.float64), rtol=0, atol=1e-3
    )


def test_a_domain_without_text_is_taken_for_the_average() -> None:
    layer = route([[900, 100], [0, 0]])
    found = rates([layer], [1000, 0])
    torch.testing.assert_close(found[1], torch.tensor([0.9, 0.1], dtype=torch.float64), rtol=0.02, atol=0.001)


def test_an_expert_nobody_reached_is_sought_where_least_was_tried() -> None:
    layer = route([[2000, 2000, 0], [100, 100, 0]])
    found = rates([layer], [2000, 100])
    assert found[1, 2] > found[0, 2] > 0


def test_rows_come_from_the_domain_that_feeds_the_starved() -> None:
    need = torch.tensor([0.0, 100.0])
    gain = torch.tensor([[32.0, 0.0], [0.0, 32.0], [30.0, 2.0]])
    assert choose(need, gain, [9, 9, 9], 100) == [0, 4, 0]
    assert choose(need, gain, [9, 2, 9], 100) == [0, 2, 9], "the second best when the best has ended"
    assert choose(need, gain, [9, 9, 9], 3) == [0, 3, 0]
    assert choose(torch.tensor([-5.0, 0.0]), gain, [9, 9, 9], 100) == [0, 0, 0]


@given(st.data())
def test_the_choice_keeps_its_limits_and_wastes_no_row(data: st.DataObject) -> None:
    domains, experts = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    number = st.integers(0, 40)
    grid = st.lists(st.lists(number, min_size=experts, max_size=experts), min_size=domains, max_size=domains)
    gain = torch.tensor(data.draw(grid), dtype=torch.float64)
    need = torch.tensor(
        data.draw(st.lists(st.integers(-50, 200), min_size=experts, max_size=experts))
    ).double()
    available = data.draw(st.lists(st.integers(0, 12), min_size=domains, max_size=domains))
    rows = data.draw(st.integers(0, 30))
    taken = choose(need, gain, available, rows)
    assert sum(taken) <= rows and all(a <= b for a, b in zip(taken, available, strict=True))
    brought = torch.tensor(taken).double() @ gain
    lacking = (need - brought).clamp(min=0)
    if sum(taken) < rows:
        idle = [d for d in range(domains) if taken[d] < available[d]]
        assert all((torch.minimum(gain[d], lacking) == 0).all() for d in idle), "it stopped with work left"
    for domain, count in enumerate(taken):
        if count:
            assert (gain[domain] * (need > 0)).any(), "a domain that feeds nobody in need"


@pytest.fixture(scope="module")
def divided(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """One layer whose experts 0-3 see tokens below 192 and 4-7 the others, because the embedding says so."""
    folder = models.build(tmp_path_factory.mktemp("divided"), "qwen3_moe", num_hidden_layers=1)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(256, generator=generator)
    side = torch.where(torch.arange(models.VOCAB) < 192, 1.0, -1.0)
    embedding = tensors["model.embed_tokens.weight"].float() + side[:, None] * direction
    router = torch.randn(8, 256, generator=generator)
    # Within a side the tokens' own values decide: nothing of the direction may favour an expert.
    router -= (router @ direction)[:, None] * direction / direction.square().sum()
    router[:4] += direction
    router[4:] -= direction
    starving.rewrite(
        folder,
        {
            "model.embed_tokens.weight": embedding,
            "model.layers.0.self_attn.o_proj.weight": torch.zeros_like(
                tensors["model.layers.0.self_attn.o_proj.weight"]
            ),
            "model.layers.0.post_attention_layernorm.weight": torch.ones(256),
            starving.GATE.format(0): router,
        },
    )
    return open_checkpoint(folder)


def pool(low: int, high: int) -> Rows:
    """`low` rows of tokens below 192, then `high` rows of the others."""
    generator = torch.Generator().manual_seed(5)
    parts = [
        torch.randint(0, 192, (low, LENGTH), generator=generator),
        torch.randint(192, models.VOCAB, (high, LENGTH), generator=generator),
    ]
    ids = torch.cat(parts)
    return Rows(ids, ("low",) * low + ("high",) * high, "pool", ids.numel())


def test_the_model_is_divided(divided) -> None:
    (found,) = calibrate(divided, pool(4, 4)).routes
    assert found.domain_tokens[0, 4:].sum() == 0 == found.domain_tokens[1, :4].sum()


def test_starved_experts_are_fed_by_the_domain_that_feeds_them(divided) -> None:
    text = pool(30, 30)
    found = cover(divided, text, 12 * LENGTH, 0.2, 60 * LENGTH, calibrate)
    (layer,) = found.calibration.routes
    assert found.target == target_tokens(calibrate(divided, take(text, range(12))).routes, 0.2)
    assert found.stopped == "every expert is fed" and not found.starved
    assert int(layer.tokens.min()) >= found.target
    # The rates of a domain never tried start at the average, so rows of "low" may be tried too.
    assert found.drawn["high"] > found.drawn["low"] - 12
    assert found.calibration.tokens == LENGTH * sum(found.drawn.values())
    assert found.calibration.domains == ("low", "high")


def test_the_statistics_are_those_of_the_rows_drawn(divided) -> None:
    text = pool(30, 30)
    found = cover(divided, text, 12 * LENGTH, 0.2, 60 * LENGTH, calibrate)
    low, high = found.drawn["low"], found.drawn["high"]
    again = calibrate(divided, take(text, [*range(low), *range(30, 30 + high)]))
    assert torch.equal(again.routes[0].domain_tokens, found.calibration.routes[0].domain_tokens)
    for name, stats in again.inputs.items():
        torch.testing.assert_close(found.calibration.inputs[name].moment, stats.moment, rtol=1e-5, atol=0)


def test_the_budget_and_the_pool_end_it_and_the_starved_are_named(divided) -> None:
    spent = cover(divided, pool(30, 30), 12 * LENGTH, 0.2, 13 * LENGTH, calibrate)
    assert spent.stopped == "budget" and spent.calibration.rows == 13
    assert {one.expert for one in spent.starved} <= {4, 5, 6, 7} and spent.starved
    ended = cover(divided, pool(14, 0), 12 * LENGTH, 0.2, 99 * LENGTH, calibrate)
    assert ended.stopped == "pool" and ended.calibration.rows == 14
    assert [(one.layer, one.expert, one.tokens) for one in ended.starved if one.expert > 3] == [
        (0, expert, 0) for expert in range(4, 8)
    ]


def test_experts_that_nothing_feeds_cost_the_budget_and_no_more(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(starving.never_chosen(tmp_path, dead=2))
    found = cover(checkpoint, pool(10, 10), 4 * LENGTH, 0.1, 16 * LENGTH, calibrate)
    assert found.stopped == "budget" and found.calibration.rows == 16
    assert {(one.layer, one.expert) for one in found.starved if one.tokens == 0} == {
        (layer, expert) for layer in (0, 1) for expert in (6, 7)
    }


def test_fed_experts_need_one_round(divided) -> None:
    text = pool(6, 6)
    even = take(text, [row for pair in zip(range(6), range(6, 12), strict=True) for row in pair])
    found = cover(divided, even, 10 * LENGTH, 0.01, 12 * LENGTH, calibrate)
    assert (found.rounds, found.calibration.rows, found.drawn) == (1, 10, {"low": 5, "high": 5})
