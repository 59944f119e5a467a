"""The divergence from some tokens is that from all of them, or nearly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moequant.errors import VerifyError
from moequant.plan.vocabulary import Said


def exact(base: Tensor, other: Tensor) -> Tensor:
    """KL divergence f64 [m], by the definition."""
    p, q = (torch.log_softmax(each.double(), -1) for each in (base, other))
    return (p.exp() * (p - q)).sum(-1)


def logits(vocab: int, sharp: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Of a head of random rows, at 96 positions with something in common; of hidden states, and of others
    near them."""
    generator = torch.Generator().manual_seed(seed)
    head = torch.randn(vocab, 64, generator=generator) / 8
    common, own, change = (torch.randn(n, 64, generator=generator) for n in (1, 96, 96))
    states = sharp * (common + own)
    return states @ head.T, (states + 0.3 * change) @ head.T


@pytest.mark.parametrize("sharp", [0.5, 4.0, 12.0])
@pytest.mark.parametrize("seed", range(3))
def test_some_tokens_say_what_all_do(sharp: float, seed: int) -> None:
    base, other = logits(40_000, sharp, seed)
    said = Said.of(torch.log_softmax(base, -1), 4096)
    found, wanted = said.divergence(other[:, said.tokens]), exact(base, other)
    assert len(said.tokens) == 4096 and bool((said.tokens.diff() > 0).all())
    assert float(found.mean() / wanted.mean()) == pytest.approx(1, abs=0.03)
    assert bool((found >= -1e-12).all())


def test_all_tokens_are_exact() -> None:
    base, other = logits(1000, 4.0)
    base[:, 17] = -torch.inf  # a token that is never said
    said = Said.of(torch.log_softmax(base, -1))
    assert torch.equal(said.tokens, torch.arange(1000))
    kept = torch.cat([base[:, :17], base[:, 18:]], 1), torch.cat([other[:, :17], other[:, 18:]], 1)
    other[:, 17] = -torch.inf
    torch.testing.assert_close(said.divergence(other), exact(*kept), rtol=1e-4, atol=1e-7)


def test_the_same_model_has_no_divergence() -> None:
    base, _ = logits(40_000, 4.0)
    said = Said.of(torch.log_softmax(base, -1), 512)
    assert float(said.divergence(base[:, said.tokens]).abs().max()) < 1e-6


def test_no_number_is_an_error() -> None:
    base, other = logits(300, 4.0)
    other[3, 5] = torch.nan
    with pytest.raises(VerifyError, match="NaN"):
        Said.of(torch.log_softmax(base, -1)).divergence(other)
