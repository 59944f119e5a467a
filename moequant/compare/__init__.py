"""What quantization changed, measured: two models on the same text, token by token and expert by expert."""

from moequant.compare.scores import (
    Comparison,
    Difference,
    Estimate,
    Scores,
    difference,
    score_row,
    score_tokens,
    summarize,
)
from moequant.compare.values import Measured, Ran, RoutingChange, WeightError

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
    "score_row",
    "score_tokens",
    "summarize",
]
