"""`moequant.library.plan`."""

from __future__ import annotations

from moequant.commands import plan as planning
from moequant.commands.plan import Outputs as PlanOutputs
from moequant.commands.plan import PlanSettings, Survey
from moequant.hub import Source
from moequant.progress import Listener, listening
from moequant.report.curve import curve_tables
from moequant.report.machine import survey_json
from moequant.report.shown import Result, View

__all__ = ["PlanOutputs", "PlanSettings", "plan"]

PLANNED: View[Survey] = View(
    "plan", lambda found: curve_tables(found.curve), lambda found: survey_json(found.curve)
)


def plan(
    model: Source,
    settings: PlanSettings = PlanSettings(),  # frozen
    outputs: PlanOutputs = PlanOutputs(),
    progress: Listener | None = None,
) -> Result[Survey]:
    """Measure what every type costs every weight, and find the best mix for each size that is named.

    `found.curve` has (file bytes, predicted KL divergence in nats per token) of every size worth having, and
    the plans that were asked for. `outputs` may name files for the one plan and for a picture. PlanError for
    a size that no file can have.
    """
    with listening(progress):
        return Result(planning.survey(model, settings, outputs), PLANNED)
