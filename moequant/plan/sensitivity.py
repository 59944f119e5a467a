"""What every format costs every weight in KL divergence: measured (`plan.measure`) or from tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import sqrt

from moequant.containers.gguf.sizes import bits_of
from moequant.values import Role, Weight

CANDIDATES = (
    "IQ1_S",
    "IQ1_M",
    "IQ2_XXS",
    "IQ2_XS",
    "IQ2_S",
    "Q2_K",
    "IQ3_XXS",
    "IQ3_S",
    "Q3_K",
    "IQ4_XS",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "Q8_0",
)
"""Types a plan chooses from, when 256 divides the rows."""

SHORT_CANDIDATES = ("IQ4_NL", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
"""Types with blocks of 32, for rows that 256 does not divide."""

SENSITIVITY: Mapping[Role, float] = {
    Role.EMBEDDING: 0.41,
    Role.OUTPUT: 0.75,
    Role.ATTN_Q: 0.35,
    Role.ATTN_K: 0.35,
    Role.ATTN_V: 0.70,
    Role.ATTN_OUT: 0.80,
    Role.GATE: 0.50,
    Role.UP: 0.49,
    Role.DOWN: 1.00,
    Role.DENSE_GATE: 0.50,
    Role.DENSE_UP: 0.49,
    Role.DENSE_DOWN: 1.00,
}
"""KL divergence per unit of relative error in all of a role's weights, each layer an equal share of it.

Between what one weight at a time costs in two trained models (`benchmarks/cases/sensitivity.py`, results
beside it) and what whole plans cost them. All experts of a layer count as one weight, because a
token's top-k weights add up to about one.
"""

OTHER_SENSITIVITY = 0.6
"""For roles that neither model has: the middle of the table."""

RELATIVE_ERROR: Mapping[str, float] = {
    "IQ1_S": 2.0e-1,
    "IQ1_M": 1.6e-1,
    "IQ2_XXS": 9.6e-2,
    "IQ2_XS": 7.2e-2,
    "Q2_K": 6.0e-2,
    "IQ2_S": 5.2e-2,
    "IQ3_XXS": 2.6e-2,
    "Q3_K": 1.9e-2,
    "IQ3_S": 1.45e-2,
    "IQ4_NL": 5.0e-3,
    "IQ4_XS": 4.9e-3,
    "Q4_K": 4.4e-3,
    "Q4_1": 4.3e-3,
    "Q5_0": 1.5e-3,
    "Q5_K": 1.08e-3,
    "Q5_1": 1.05e-3,
    "Q6_K": 2.5e-4,
    "Q8_0": 2.2e-5,
}
"""Importance-weighted squared error over squared weight, default effort, experts of two trained models
(`benchmarks/cases/sensitivity.py` and `benchmarks/cases/plan.py`, results beside them)."""

EARLY_DOWN = 2.0
"""Down projections of the first eighth of the layers count this many times: errors there pass through
everything behind them (6 times the later layers' in one of those models, equal in the other; llama.cpp's
rules raise the same layers)."""


@dataclass(frozen=True, slots=True)
class Sensitivities:
    """`table`: weight name -> format -> KL divergence expected of that weight alone in that format.

    It is the format's relative error times `per_error`, the KL divergence that a unit
    of relative error in that weight costs. A whole plan whose sensitivities add up to x has the
    KL divergence linear * x + root * sqrt(x). `source` says where the numbers come from.
    """

    table: Mapping[str, Mapping[str, float]]
    per_error: Mapping[str, float]
    source: str
    linear: float = 1.0
    root: float = 0.0
    measured: bool = True

    def predict(self, total: float) -> float:
        """KL divergence of a plan whose weights' sensitivities add up to `total`."""
        return self.linear * total + self.root * sqrt(total)

    def after(self, rounding: Mapping[str, float]) -> Sensitivities:
        """The same when better rounding leaves only a share of what a format costs (1 where not listed)."""
        table = {
            weight: {name: kl * rounding.get(name, 1.0) for name, kl in row.items()}
            for weight, row in self.table.items()
        }
        return replace(self, table=table)


def candidates(weight: Weight) -> tuple[str, ...]:
    """The formats that a weight may have, smallest first."""
    if weight.fixed_type is not None:
        return (weight.fixed_type,)
    if weight.n_in % 32:
        return ("F16",)
    names = CANDIDATES if weight.n_in % 256 == 0 else SHORT_CANDIDATES
    if (exact := as_stored(weight)) is not None and exact not in names:
        names = (*names, exact)
    return tuple(sorted(names, key=bits_of))


def as_stored(weight: Weight) -> str | None:
    """The format that has the very numbers of the checkpoint in fewer bits than floats, if one does."""
    kind = weight.origin.shipped
    return None if kind in (None, "F32", "F16", "BF16", "NVFP4") else kind


def prior_sensitivities(weights: tuple[Weight, ...], layers: int) -> Sensitivities:
    """Sensitivities from tables of two trained models, for when nothing was measured."""
    per_error = {weight.name: _sensitivity(weight, layers) for weight in weights}
    table = {
        weight.name: {
            name: 0.0 if name == as_stored(weight) else per_error[weight.name] * RELATIVE_ERROR.get(name, 0.0)
            for name in candidates(weight)
        }
        for weight in weights
    }
    return Sensitivities(table, per_error, "tables of two trained models, not this one", measured=False)


def _sensitivity(weight: Weight, layers: int) -> float:
    """A weight's share of its role's sensitivity: nothing of one that the model does not run."""
    if not weight.runs:
        return 0.0
    whole = SENSITIVITY.get(weight.role, OTHER_SENSITIVITY)
    if weight.layer is None:
        return whole
    early = weight.role.endswith("down") and weight.layer < max(1, layers // 8)
    return whole / layers * (EARLY_DOWN if early else 1.0)
