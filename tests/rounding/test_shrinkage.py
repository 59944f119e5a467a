"""Mixes are what they say, and those chosen serve tokens that nobody has seen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moequant.formats import FORMATS
from moequant.rounding import Mix, Options, Trial, round_to_hessian, shrink
from moequant.rounding.shrinkage import DIAGONAL, MIXES, Layer, tried
from tests.rounding.data import lost

QUICK = Options(effort="fast", rounds=1, threads=1)
FMT = FORMATS["Q4_K"]


def layer(tokens: list[int], shared: float, seed: int = 0) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """weights, Grams of two halves of `tokens`, and of very many tokens; experts share most directions.

    `shared` is the share of the inputs' power in 32 directions (of 256).
    """
    g = torch.Generator().manual_seed(seed)
    common = torch.randn(32, 256, generator=g)
    weights = 0.02 * torch.randn(len(tokens), 48, 256, generator=g)
    halves: tuple[list[Tensor], list[Tensor]] = ([], [])
    truth = []
    for n in tokens:
        own = (common + 0.5 * torch.randn(32, 256, generator=g)) * (shared / 1.25 / 32) ** 0.5
        size = torch.exp(0.4 * torch.randn(256, generator=g))

        def gram(n: int, own: Tensor = own, size: Tensor = size) -> Tensor:
            x = torch.randn(n, 32, generator=g) @ own + (1 - shared) ** 0.5 * torch.randn(n, 256, generator=g)
            return (x * size).T @ (x * size)

        halves[0].append(gram(n // 2))
        halves[1].append(gram(n - n // 2))
        truth.append(gram(20_000) / 20_000)
    return weights, (torch.stack(halves[0]), torch.stack(halves[1])), torch.stack(truth)


def relative(weights: Tensor, hessian: Tensor, truth: Tensor) -> Tensor:
    """f64 [E]: error of rounding by `hessian` over that of its diagonal alone, on unseen tokens."""
    alone = torch.diag_embed(hessian.diagonal(dim1=1, dim2=2))
    data, plain = (round_to_hessian(FMT, weights, h, QUICK).data for h in (hessian, alone))
    return lost(FMT, weights, data, truth) / lost(FMT, weights, plain, truth)


def test_a_mix_is_what_it_says() -> None:
    _, halves, _ = layer([100, 400], 0.7)
    first = halves[0].double()
    common = Layer.of(halves[0], torch.tensor([50, 200]))
    pooled = first.sum(0)
    square = pooled.diagonal() / 250
    correlation = pooled / (pooled.diagonal()[:, None] * pooled.diagonal()).sqrt()
    diagonal = first[1].diagonal() + 32 * square
    expected = 0.5 * first[1] + 0.3 * correlation * (diagonal[:, None] * diagonal).sqrt()
    expected = expected + 0.2 * torch.diag(diagonal)
    torch.testing.assert_close(
        common.mixed(halves[0][1], Mix(0.5, 0.3, 0.2)).double(), expected, rtol=1e-5, atol=1e-4
    )
    only = common.mixed(halves[0][1], DIAGONAL)
    assert torch.equal(only, torch.diag(only.diagonal()))


def test_what_is_chosen_serves_unseen_tokens() -> None:
    tokens = [70, 90, 600, 900, 8000, 9000]
    weights, halves, truth = layer(tokens, 0.7)
    shrunk = shrink(FMT, weights, halves, torch.tensor(tokens), options=QUICK)
    assert [(c.above, c.experts) for c in shrunk.choices] == [(0.25, (0, 1)), (1.0, (2, 3)), (16.0, (4, 5))]
    raw = relative(weights, halves[0] + halves[1], truth)
    ours = relative(weights, shrunk.hessian, truth)
    assert (raw[:2] > 0.95).all()  # all that plain GPTQ does for rare experts
    assert ours.max() < 0.97
    assert ours[:2].mean() < 0.8 * raw[:2].mean()
    assert ours[4:].mean() < 1.03 * raw[4:].mean()
    for choice in shrunk.choices:
        assert set(choice.errors) == set(MIXES)
        assert choice.errors[DIAGONAL] == 1.0
        assert choice.errors[choice.mix] == min(choice.errors.values())
    few, many = shrunk.choices[0].mix, shrunk.choices[-1].mix
    assert few.own < many.own


def test_without_correlation_little_can_be_lost() -> None:
    tokens = [80, 100, 120]
    weights, halves, truth = layer(tokens, 0.0)
    shrunk = shrink(FMT, weights, halves, torch.tensor(tokens), options=QUICK)
    assert relative(weights, shrunk.hessian, truth).mean() < 1.02
    assert relative(weights, halves[0] + halves[1], truth).mean() > 1.1


def test_the_diagonal_is_always_tried() -> None:
    weights, halves, _ = layer([100], 0.0)
    shrunk = shrink(FMT, weights, halves, torch.tensor([100]), Trial(mixes=(Mix(1, 0, 0),)), QUICK)
    assert shrunk.choices[0].mix == DIAGONAL
    assert list(shrunk.choices[0].errors) == [DIAGONAL, Mix(1, 0, 0)]


def test_unseen_and_broken_experts() -> None:
    tokens = [0, 3000, 2500, 700]
    weights, halves, _ = layer(tokens, 0.7)
    halves[0][2, 4, 4] = torch.nan
    shrunk = shrink(FMT, weights, halves, torch.tensor(tokens), options=QUICK)
    unseen = shrunk.choices[0]
    assert unseen.experts == (0,)
    assert unseen.errors == {}
    assert unseen.mix == shrunk.choices[1].mix
    assert torch.isfinite(shrunk.hessian[[0, 1, 3]]).all()
    assert (shrunk.hessian[0].diagonal() > 0).all()
    rounded = round_to_hessian(FMT, weights, shrunk.hessian, QUICK)
    assert [(f.expert, f.reason) for f in rounded.fallbacks] == [(2, "the Hessian is not finite")]


def test_a_layer_that_saw_nothing_falls_back() -> None:
    weights, halves, _ = layer([0, 0], 0.5)
    shrunk = shrink(FMT, weights, halves, torch.tensor([0, 0]), options=QUICK)
    assert shrunk.choices[0].mix == DIAGONAL
    rounded = round_to_hessian(FMT, weights, shrunk.hessian, QUICK)
    assert {f.reason for f in rounded.fallbacks} == {"no input was seen"}
    assert len(rounded.fallbacks) == 2


@pytest.mark.parametrize("name", ["Q2_K", "IQ2_S"])
def test_any_format(name: str) -> None:
    tokens = [60, 3000]
    weights, halves, _ = layer(tokens, 0.7)
    shrunk = shrink(name, weights, halves, torch.tensor(tokens), Trial(rows=16), QUICK)
    assert all(choice.errors[choice.mix] <= 1 for choice in shrunk.choices)


def test_mixes_that_come_to_the_same_are_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the six, two are the same where experts have a scale in common and no correlation; and what one
    loses does not depend on how many are tried beside it."""
    weights, halves, _ = layer([300], 0.7)
    alone = Layer(None, halves[0][0].diagonal().double() / 150)
    rounded = list[Tensor]()

    def watched(fmt, weights: Tensor, hessian: Tensor, options: Options):
        rounded.extend(hessian)
        return round_to_hessian(fmt, weights, hessian, options)

    monkeypatch.setattr("moequant.rounding.shrinkage.round_to_hessian", watched)
    pair = halves[0][0], halves[1][0]
    errors = tried(FMT, weights[0], pair, alone, Trial(), QUICK)
    assert list(errors) == list(MIXES) and len(rounded) == 5
    assert errors[Mix(0.25, 0.5, 0.25)] == errors[Mix(0.25, 0, 0.75)]
    for mix in MIXES[1:]:
        assert tried(FMT, weights[0], pair, alone, Trial(mixes=(mix,)), QUICK)[mix] == errors[mix]
    every = Layer.of(halves[0], torch.tensor([150]))
    rounded.clear()
    tried(FMT, weights[0], pair, every, Trial(), QUICK)
    assert len(rounded) == 6
    for other in (alone, every):
        rounded.clear()
        assert tried(FMT, weights[0], pair, other, Trial(mixes=(DIAGONAL,)), QUICK) == {DIAGONAL: 1.0}
        assert not rounded, "nothing is to be chosen"
