"""The divergence of what two models say, from some of the tokens that they may say.

Of 150,000 logits nearly all are those of tokens that nobody expects, and a head that makes them all costs a
probe more than several layers. So tokens are drawn by what the model expects in a row of text, and each
stands for the others like it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moequant.errors import VerifyError

TOKENS = 1 << 13
"""Tokens that are drawn; a smaller vocabulary takes part as a whole, and the divergence is exact."""


@dataclass(frozen=True, slots=True)
class Said:
    """What a model says at m positions: drawn `tokens` i64 [s], ascending; the logarithm of the chance that
    each was `drawn` with f64 [s]; the model's log-probabilities of them `log_p` f32 [m, s]."""

    tokens: Tensor
    drawn: Tensor
    log_p: Tensor

    @classmethod
    def of(cls, log_p: Tensor, count: int = TOKENS) -> Said:
        """From log-probabilities f32 [m, vocab] of all tokens, `count` of them drawn.

        Systematic sampling with a chance in proportion to the mean probability, 1 at most (Madow, "On the
        theory of systematic sampling, II", 1949). Nothing is random.
        """
        expected = torch.logsumexp(log_p, 0).double().exp()  # of m positions together
        chance = _chances(expected, min(count, log_p.shape[-1]))
        # Token k is drawn when a whole number and a half lies between the sums up to it and with it.
        bounds = (chance.cumsum(0) + 0.5).floor()
        tokens = torch.diff(bounds, prepend=bounds.new_zeros(1)).nonzero().flatten()
        return cls(tokens, chance[tokens].log(), log_p[:, tokens])

    def divergence(self, logits: Tensor) -> Tensor:
        """KL divergence f64 [m] of another model to this one, from its logits [m, s] of the drawn tokens.

        With d the difference of logits it is log E[exp d] - E[d], each mean over the tokens as the model
        expects them. VerifyError where a logit is NaN.
        """
        if logits.isnan().any():
            raise VerifyError("the candidate's logits are NaN: its weights are damaged, or overflow")
        ours, theirs = self.log_p.double(), logits.double()
        sums = [torch.logsumexp(each - self.drawn, -1) for each in (ours, theirs)]
        share = torch.exp(ours - self.drawn - sums[0][:, None])
        moved = torch.where(share > 0, share * (theirs - ours), 0.0).sum(-1)
        return sums[1] - sums[0] - moved


def _chances(expected: Tensor, count: int) -> Tensor:
    """Chances f64 [vocab] that add up to `count`: in proportion to what is expected, and 1 at most."""
    if count == len(expected):
        return torch.ones_like(expected)
    # What nobody expects has a chance too: another model may expect it.
    expected = expected + expected.sum() / (count * len(expected))
    chance, sure = torch.zeros_like(expected), torch.zeros_like(expected, dtype=torch.bool)
    while True:
        left = torch.where(sure, 0.0, expected)
        chance = torch.where(sure, 1.0, left * ((count - sure.sum()) / left.sum()))
        if not (over := chance > 1).any():
            return chance
        sure |= over
