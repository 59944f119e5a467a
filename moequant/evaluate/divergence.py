"""Perplexity and KL divergence of a candidate against its baseline, as llama-perplexity defines them.

Rows of n tokens; the logits at positions n/2 … n-2 are scored against the next token.
Perplexity is exp of the mean negative log-likelihood; KL divergence is
sum p·(log p - log q) over the vocabulary, p the baseline's distribution, terms with
log p <= -16 left out. Δp is the candidate's probability of the true token minus the
baseline's (llama.cpp, tools/perplexity). Errors are standard errors of means over tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moequant.errors import VerifyError

LOG_P_FLOOR = -16.0

LOGITS = 1 << 24
"""Logits that are scored at a time, tokens x vocabulary: 64 MiB a copy."""

TOP = 5
"""How many of the likeliest tokens are compared besides the first."""

PERCENTILES = (0.1, 1.0, 5.0, 10.0, 25.0, 50.0, 75.0, 90.0, 95.0, 99.0, 99.9)


@dataclass(frozen=True, slots=True)
class Scores:
    """Per scored token, f64 [n]: negative log-likelihoods of both models, KL divergence, agreement.

    `same_top` is 1 where both put the same token first; `top5` the share of the baseline's
    five likeliest tokens that are among the candidate's five (None: not measured).
    """

    base_nll: Tensor
    candidate_nll: Tensor
    kl: Tensor
    same_top: Tensor
    top5: Tensor | None = None

    def part(self, mask: Tensor) -> Scores:
        """The tokens where `mask`, bool [n], is set."""
        top5 = None if self.top5 is None else self.top5[mask]
        return Scores(self.base_nll[mask], self.candidate_nll[mask], self.kl[mask], self.same_top[mask], top5)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and its standard error."""

    value: float
    error: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """What quantization changed, over `tokens` scored tokens of `source`.

    `log_ratio` is log(perplexity / base_perplexity), its error paired token by token.
    `kl_percentiles` and `dp_percentiles` are at `PERCENTILES`; `dp_rms` and `dp_percentiles`
    are changes of a probability, 0 to 1.
    """

    tokens: int
    base_perplexity: Estimate
    perplexity: Estimate
    log_ratio: Estimate
    kl_mean: Estimate
    kl_max: float
    kl_percentiles: tuple[float, ...]
    dp_rms: Estimate
    dp_percentiles: tuple[float, ...]
    same_top: float
    same_top_error: float
    top5: float | None
    source: str

    @property
    def kl_median(self) -> float:
        """Half of the tokens have less."""
        return self.kl_percentiles[PERCENTILES.index(50.0)]

    @property
    def kl_99(self) -> float:
        """99 % of the tokens have less."""
        return self.kl_percentiles[PERCENTILES.index(99.0)]

    @property
    def kl_999(self) -> float:
        """99.9 % of the tokens have less."""
        return self.kl_percentiles[PERCENTILES.index(99.9)]


@dataclass(frozen=True, slots=True)
class Difference:
    """One candidate minus another on the same tokens, errors paired: most of the noise is common to both."""

    first: str
    second: str
    kl: Estimate
    log_perplexity: Estimate

    @property
    def sigmas(self) -> float:
        """How many standard errors the KL divergences are apart."""
        return abs(self.kl.value) / self.kl.error if self.kl.error else 0.0


def score_row(base: Tensor, candidate: Tensor, ids: Tensor) -> Scores:
    """Scores of one row's second half from logits [n, vocab] of both models and its token ids [n]."""
    n = len(ids)
    scored = slice(n // 2, n - 1)
    return score_tokens(base[scored], candidate[scored], ids[n // 2 + 1 :])


def score_tokens(base: Tensor, candidate: Tensor, target: Tensor) -> Scores:
    """Scores of m tokens `target` i64 [m] from the logits [m, vocab] in front of each, a few at a time.

    VerifyError where a model computes no numbers: every figure would be one, and none would say so.
    """
    step = max(1, LOGITS // base.shape[-1])
    parts = zip(*(torch.split(each, step) for each in (base, candidate, target)), strict=True)
    return join([_score(*part) for part in parts])


def log_softmax(name: str, logits: Tensor) -> Tensor:
    """The log-probabilities f32 of a model that is called so."""
    logs = torch.log_softmax(logits.float(), -1)
    if logs.isnan().any():
        raise VerifyError(f"the {name}'s logits are NaN: its weights are damaged, or overflow")
    return logs


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    terms = torch.where(log_p > LOG_P_FLOOR, log_p.exp() * (log_p - log_q), 0.0)
    return terms.sum(-1, dtype=torch.float64)


def _score(base: Tensor, candidate: Tensor, target: Tensor) -> Scores:
    log_p, log_q = log_softmax("baseline", base), log_softmax("candidate", candidate)
    count = min(TOP, log_p.shape[-1])
    top_p, top_q = log_p.topk(count).indices, log_q.topk(count).indices
    return Scores(
        base_nll=-log_p.gather(1, target[:, None])[:, 0].double(),
        candidate_nll=-log_q.gather(1, target[:, None])[:, 0].double(),
        kl=_divergence(log_p, log_q),
        same_top=(log_p.argmax(-1) == log_q.argmax(-1)).double(),
        top5=(top_p[:, :, None] == top_q[:, None, :]).any(2).double().mean(1),
    )


def join(parts: Sequence[Scores]) -> Scores:
    """The scores of several pieces of text, in their order."""
    top5 = [part.top5 for part in parts if part.top5 is not None]
    return Scores(
        torch.cat([part.base_nll for part in parts]),
        torch.cat([part.candidate_nll for part in parts]),
        torch.cat([part.kl for part in parts]),
        torch.cat([part.same_top for part in parts]),
        torch.cat(top5) if len(top5) == len(parts) else None,
    )


def summarize(scores: Scores, source: str) -> Comparison:
    """Means with standard errors, and the quantiles people quote."""
    change = (-scores.candidate_nll).exp() - (-scores.base_nll).exp()
    square = _mean(change.square())
    rms = square.value**0.5
    same_top = float(scores.same_top.mean())
    return Comparison(
        tokens=len(scores.kl),
        base_perplexity=_perplexity(scores.base_nll),
        perplexity=_perplexity(scores.candidate_nll),
        log_ratio=_mean(scores.candidate_nll - scores.base_nll),
        kl_mean=_mean(scores.kl),
        kl_max=float(scores.kl.max()),
        kl_percentiles=_percentiles(scores.kl),
        dp_rms=Estimate(rms, 0.5 * square.error / rms if rms else 0.0),
        dp_percentiles=_percentiles(change),
        same_top=same_top,
        same_top_error=_mean(scores.same_top).error,
        top5=None if scores.top5 is None else float(scores.top5.mean()),
        source=source,
    )


def difference(first: tuple[str, Scores], second: tuple[str, Scores]) -> Difference:
    """The second candidate minus the first; both scored on the same tokens."""
    (one, a), (two, b) = first, second
    return Difference(one, two, _mean(b.kl - a.kl), _mean(b.candidate_nll - a.candidate_nll))


def _mean(values: Tensor) -> Estimate:
    return Estimate(float(values.mean()), float(values.std(unbiased=True) / len(values) ** 0.5))


def _percentiles(values: Tensor) -> tuple[float, ...]:
    shares = torch.tensor(PERCENTILES, dtype=values.dtype) / 100
    return tuple(torch.quantile(values, shares).tolist())


def _perplexity(nll: Tensor) -> Estimate:
    mean = _mean(nll)
    value = float(torch.tensor(mean.value, dtype=torch.float64).exp())
    return Estimate(value, value * mean.error)
