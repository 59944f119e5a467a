"""`moequant.library.route`."""

from __future__ import annotations

from moequant.commands import route as routing
from moequant.commands.route import Outputs as RouteOutputs
from moequant.commands.route import Routed, RouteSettings
from moequant.hub import Source
from moequant.progress import Listener, listening
from moequant.report.routing import routing_json, routing_tables
from moequant.report.shown import Result, View
from moequant.statistics.health import health

__all__ = ["RouteOutputs", "RouteSettings", "route"]

ROUTED: View[Routed] = View(
    "route",
    lambda found: routing_tables(health(found.stored.calibration), found.coverage),
    lambda found: routing_json(health(found.stored.calibration), found.stored.calibration, found.coverage),
)


def route(
    model: Source,
    settings: RouteSettings = RouteSettings(),  # frozen
    outputs: RouteOutputs = RouteOutputs(),
    progress: Listener | None = None,
) -> Result[Routed]:
    """Route text through a model and count what every expert saw.

    `found.stored.calibration.routes` has, for each layer with a router, tokens i64 [experts] and sums of
    router weights f64 [experts]; `.inputs` the moments f64 [experts, columns] of what every weight was fed.
    `outputs` may name files for statistics, an imatrix and a picture; a run that was killed goes on where it
    stopped. CorpusError for text that is too short or cannot be read.
    """
    with listening(progress):
        return Result(routing.route(model, settings, outputs), ROUTED)
