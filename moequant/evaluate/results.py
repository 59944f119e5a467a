"""What a comparison learned of one candidate."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moequant.evaluate.divergence import Comparison, Scores
from moequant.runtimes.llama_cpp.serving import Sample, Serving
from moequant.values import Role


@dataclass(frozen=True, slots=True)
class WeightError:
    """||candidate - baseline||² / ||baseline||² of every expert of one weight: `error` f64 [E].

    `tokens` i64 [E], how many tokens of the text the baseline sent to each expert (None when dense).
    """

    weight: str
    role: Role
    layer: int | None
    error: Tensor
    tokens: Tensor | None


@dataclass(frozen=True, slots=True)
class RoutingChange:
    """Share of tokens whose set of experts in a layer is another one, of all text and by domain.

    `by_expert`: of the tokens that the baseline sends to an expert, the share that the candidate does not
    send there; None for an expert without tokens.
    """

    layer: int
    changed: float
    by_domain: tuple[float, ...]
    by_expert: tuple[float | None, ...] = ()


@dataclass(frozen=True, slots=True)
class Measured:
    """One candidate beside its baseline.

    `domains` has a Comparison for every domain of the text (its `source` is the domain's
    name) when there are several. `routing` and `errors` are empty where nobody can look
    inside: in another engine, and routing in a dense model.
    """

    name: str
    comparison: Comparison
    domains: tuple[Comparison, ...]
    scores: Scores
    routing: tuple[RoutingChange, ...]
    errors: tuple[WeightError, ...]

    @property
    def expert_errors(self) -> list[tuple[float, float, WeightError, int]]:
        """(error, times the median of its tensor's experts, tensor, expert), the worst expert first."""
        rows = [
            (error, error / middle, one, expert)
            for one in self.errors
            if one.role.is_expert
            for middle in [max(float(one.error.quantile(0.5)), 1e-300)]
            for expert, error in enumerate(one.error.tolist())
        ]
        return sorted(rows, key=lambda row: -row[0])


@dataclass(frozen=True, slots=True)
class Ran:
    """What one version made of the prompts. `serving` where llama.cpp ran it; `samples` are empty
    where the model did not fit the memory."""

    name: str
    samples: tuple[Sample, ...]
    serving: Serving | None = None
