"""Importance: finite, never 0, the expert's own where it was measured, the layer's where it was not."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from moequant.statistics.importance import importance
from moequant.values import InputStats


def stats(tokens: list[int], n_in: int = 8, seed: int = 0, gate: float = 0.5) -> InputStats:
    generator = torch.Generator().manual_seed(seed)
    counts = torch.tensor(tokens)
    mean = torch.rand(len(tokens), n_in, generator=generator, dtype=torch.float64) + 0.1
    moment = mean * counts[:, None]
    return InputStats(counts, gate * counts, gate**2 * counts, moment, gate**2 * moment)


def test_plenty_of_tokens_keep_their_own_mean() -> None:
    seen = stats([1_000_000, 2_000_000])
    expected = seen.moment / seen.tokens[:, None]
    torch.testing.assert_close(importance(seen).double(), expected, rtol=1e-3, atol=0)
    torch.testing.assert_close(importance(seen, "gate2").double(), expected, rtol=1e-3, atol=0)


def test_an_unseen_expert_gets_the_pooled_mean() -> None:
    seen = stats([100, 0, 300])
    pooled = seen.moment.sum(0) / 400
    torch.testing.assert_close(importance(seen)[1].double(), pooled, rtol=1e-6, atol=0)


def test_a_rare_expert_lies_between_its_own_and_the_pooled_mean() -> None:
    seen = stats([10_000, 32])
    own, pooled = seen.moment[1] / 32, seen.moment.sum(0) / 10_032
    torch.testing.assert_close(importance(seen)[1].double(), (own + pooled) / 2, rtol=1e-5, atol=0)


def test_silent_channels_and_a_silent_layer_still_count() -> None:
    seen = stats([100, 100])
    seen.moment[:, 3] = 0.0
    assert (importance(seen)[:, 3] > 0).all()
    assert torch.equal(importance(stats([0, 0])), torch.ones(2, 8))
    seen.moment.zero_()
    assert (importance(seen) > 0).all()


@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=6), st.sampled_from(["none", "gate2"]))
def test_always_finite_and_positive(tokens: list[int], gating: str) -> None:
    found = importance(stats(tokens), gating)
    assert torch.isfinite(found).all() and (found > 0).all() and found.dtype == torch.float32
