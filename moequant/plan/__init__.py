"""Which format each weight gets: one budget for the whole file, spent where it buys most.

Pure arithmetic on names, shapes and sensitivities; nothing here knows torch or reads a file but
a plan's own. `make_plan` takes a `Budget` and, when they were measured, the `Sensitivities`
of every format in every weight, and finds the least total KL divergence that fits.
"""

from moequant.containers.gguf.sizes import ALIGNMENT, Budget, aligned, data_bytes, packed_bytes, parse_size
from moequant.plan.allocate import Option, Unit, allocate
from moequant.plan.choose import groups, make_plan, make_units, preset_plan
from moequant.plan.curve import Point, curve, points, preset_points
from moequant.plan.document import from_json, plan_from_types, read, to_json
from moequant.plan.pins import pinned
from moequant.plan.sensitivity import Sensitivities, candidates, prior_sensitivities

__all__ = [
    "ALIGNMENT",
    "Budget",
    "Option",
    "Point",
    "Sensitivities",
    "Unit",
    "aligned",
    "allocate",
    "candidates",
    "curve",
    "data_bytes",
    "from_json",
    "groups",
    "make_plan",
    "make_units",
    "packed_bytes",
    "parse_size",
    "pinned",
    "plan_from_types",
    "points",
    "preset_plan",
    "preset_points",
    "prior_sensitivities",
    "read",
    "to_json",
]
