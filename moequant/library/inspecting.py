"""`moequant.library.inspect`."""

from __future__ import annotations

from moequant import inspection
from moequant.hub import Model
from moequant.inspection import Inspection
from moequant.progress import Listener, listening
from moequant.report.inspect import inspection_json, inspection_report
from moequant.report.shown import Result, View

INSPECTED = View("inspect", inspection_report, inspection_json)


def inspect(model: Model, progress: Listener | None = None) -> Result[Inspection]:
    """Describe a model from its headers; no weight is read.

    `found` has parameters (all, and those that one token meets), bytes by role and type, the exact size in
    bytes of every preset, what the tokenizer is, and which runtimes know the model. CheckpointError for what
    is no model; HubError for a model of the Hub that is not to be had.
    """
    with listening(progress):
        return Result(inspection.inspect(model), INSPECTED)
