"""`moequant.library.convert` and `convert_all`."""

from __future__ import annotations

from pathlib import Path

from moequant.commands import convert as converting
from moequant.commands.settings import Settings
from moequant.hub import Source
from moequant.progress import Listener, listening
from moequant.report.conversion import Conversion
from moequant.report.summary import Report

__all__ = ["Conversion", "Report", "convert", "convert_all"]


def convert(
    model: Source,
    out: str | Path,
    settings: Settings = Settings(),  # frozen
    progress: Listener | None = None,
) -> Report:
    """Quantize a model into `out`, a GGUF file or a folder, and report what it cost.

    The report has the plan (a type for every weight), `losses` (relative squared error f64 [experts] of every
    weight's outputs, tokens i64 [experts]) and, unless `eval_tokens` is 0, `comparison`: perplexity and KL
    divergence (nats per token) with standard errors. `out` appears when it was read again and found whole;
    else it is as it was before. PlanError where `settings` name several sizes.
    """
    with listening(progress):
        return converting.convert(model, out, settings)


def convert_all(
    model: Source,
    out: str | Path,
    settings: Settings = Settings(),  # frozen
    progress: Listener | None = None,
) -> Conversion:
    """Quantize a model to every size that `settings` name, such as `type="Q4_K_M,Q3_K_M"`. It is read,
    measured and compared once for all of them.

    `out` is a folder, or a name with `{type}` in it. `reports` has a report for each file, in the order of
    the sizes. Each file has the bytes that it would have alone; where one fails, those before it stay.
    """
    with listening(progress):
        return converting.convert_all(model, out, settings)
