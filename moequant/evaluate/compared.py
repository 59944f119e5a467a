"""What a whole comparison found: a baseline, candidates, how they differ. Plain data; `report` draws it."""

from __future__ import annotations

from dataclasses import dataclass

from moequant.evaluate.divergence import Difference
from moequant.evaluate.environment import Record
from moequant.evaluate.open_source import Source
from moequant.evaluate.results import Measured, Ran
from moequant.progress import StageCost


@dataclass(frozen=True, slots=True)
class Compared:
    """Baseline, candidates, what was measured of each, and the candidates' differences pair by pair.

    `engine` computed the scores over `tokens` of `source`, whose rows are of `domains`. `ran` has
    the baseline and every candidate, or nothing when no prompt was continued.
    """

    base: Source
    candidates: tuple[Source, ...]
    measured: tuple[Measured, ...]
    differences: tuple[Difference, ...]
    engine: str
    rounded: bool
    tokens: int
    domains: tuple[str, ...]
    source: str
    cost: StageCost
    ran: tuple[Ran, ...]
    record: Record
