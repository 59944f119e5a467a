"""`moequant.library.compare`."""

from __future__ import annotations

from collections.abc import Sequence

from moequant.commands import compare as comparing
from moequant.commands.compare import CompareSettings
from moequant.evaluate.compared import Compared
from moequant.hub import Model
from moequant.progress import Listener, listening
from moequant.report import compare_page
from moequant.report.compare import compare_tables, compare_value
from moequant.report.shown import Result, View

__all__ = ["CompareSettings", "compare"]

COMPARED = View("compare", compare_tables, compare_value, compare_page.page)


def compare(
    base: Model,
    candidates: Sequence[Model],
    settings: CompareSettings = CompareSettings(),  # frozen
    progress: Listener | None = None,
) -> Result[Compared]:
    """Score candidates against a baseline: GGUF files, folders and names of the Hub, in any mix.

    `found.measured` has for every candidate perplexity and KL divergence (nats per token, standard errors
    over tokens), the relative squared error f64 [experts] of every weight, and the share of tokens that take
    other experts, layer by layer. CheckpointError for versions of different models; CorpusError for text
    that is too short.
    """
    with listening(progress):
        return Result(comparing.run(base, candidates, settings), COMPARED)
