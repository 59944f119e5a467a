"""What quantization changed, measured: two models on the same text, token by token and expert by expert."""

from moequant.evaluate.divergence import (
    Comparison,
    Difference,
    Estimate,
    Scores,
    difference,
    log_softmax,
    score_row,
    score_tokens,
    summarize,
)
from moequant.evaluate.results import Measured, Ran, RoutingChange, WeightError

__all__ = [
    "Comparison",
    "Difference",
    "Estimate",
    "Measured",
    "Ran",
    "RoutingChange",
    "Scores",
    "WeightError",
    "difference",
    "log_softmax",
    "score_row",
    "score_tokens",
    "summarize",
]
