"""Perplexity and KL divergence of a candidate against its baseline, as llama-perplexity defines them.

Rows of n tokens; the logits at positions n/2 … n-2 are scored against the next token.
Perplexity is exp of the mean negative log-likelihood; KL divergence is
sum p·(log p - log q) over the vocabulary, p the baseline's distribution, terms with
log p <= -16 left out (llama.cpp, tools/perplexity).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

LOG_P_FLOOR = -16.0


@dataclass(frozen=True, slots=True)
class Scores:
    """Per scored token, f64 [n]: negative log-likelihoods of both models, KL divergence, top-1 agreement."""

    base_nll: Tensor
    candidate_nll: Tensor
    kl: Tensor
    same_top: Tensor


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and its standard error."""

    value: float
    error: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """What quantization changed, over `tokens` scored tokens."""

    tokens: int
    base_perplexity: Estimate
    perplexity: Estimate
    kl_mean: Estimate
    kl_median: float
    kl_99: float
    same_top: float
    source: str


def compare(base: nn.Module, candidate: nn.Module, ids: Tensor, source: str) -> Comparison:
    """Score both models on rows `ids` i64 [rows, n], one row at a time."""
    with tqdm(
        total=ids.numel(), unit="tok", unit_scale=True, desc="compare", disable=None, leave=False
    ) as bar:
        parts = []
        for row in torch.split(ids, 1):
            with torch.inference_mode():
                logits = [model(input_ids=row, use_cache=False).logits[0] for model in (base, candidate)]
            parts.append(score_row(logits[0], logits[1], row[0]))
            bar.update(row.numel())
    scores = Scores(*(torch.cat(columns) for columns in zip(*map(_columns, parts), strict=True)))
    return summarize(scores, source)


def _columns(scores: Scores) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return scores.base_nll, scores.candidate_nll, scores.kl, scores.same_top


def score_row(base: Tensor, candidate: Tensor, ids: Tensor) -> Scores:
    """Scores of one row's second half from logits [n, vocab] of both models and its token ids [n]."""
    n = len(ids)
    scored = slice(n // 2, n - 1)
    log_p = torch.log_softmax(base[scored].float(), -1)
    log_q = torch.log_softmax(candidate[scored].float(), -1)
    target = ids[n // 2 + 1 :, None]
    terms = torch.where(log_p > LOG_P_FLOOR, log_p.exp() * (log_p - log_q), 0.0)
    return Scores(
        base_nll=-log_p.gather(1, target)[:, 0].double(),
        candidate_nll=-log_q.gather(1, target)[:, 0].double(),
        kl=terms.sum(-1, dtype=torch.float64),
        same_top=(log_p.argmax(-1) == log_q.argmax(-1)).double(),
    )


def summarize(scores: Scores, source: str) -> Comparison:
    """Means with standard errors, and the quantiles people quote."""
    return Comparison(
        tokens=len(scores.kl),
        base_perplexity=_perplexity(scores.base_nll),
        perplexity=_perplexity(scores.candidate_nll),
        kl_mean=_mean(scores.kl),
        kl_median=float(scores.kl.median()),
        kl_99=float(torch.quantile(scores.kl, 0.99)),
        same_top=float(scores.same_top.mean()),
        source=source,
    )


def _mean(values: Tensor) -> Estimate:
    return Estimate(float(values.mean()), float(values.std(unbiased=True) / len(values) ** 0.5))


def _perplexity(nll: Tensor) -> Estimate:
    mean = _mean(nll)
    value = float(torch.tensor(mean.value, dtype=torch.float64).exp())
    return Estimate(value, value * mean.error)
