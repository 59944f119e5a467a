"""`moequant.library.fit`: files for llama.cpp."""

from __future__ import annotations

from dataclasses import dataclass

from moequant.hub import Model, located
from moequant.inspection import fit as fitting
from moequant.inspection.fit import Fit, Hardware
from moequant.progress import Listener, listening
from moequant.report.fit import fit_json, fit_report
from moequant.report.shown import Result, View
from moequant.runtimes.llama_cpp.kv_cache import Load

__all__ = ["FitSettings", "Hardware", "Load", "fit"]

FITTED = View("fit", fit_report, fit_json)


@dataclass(frozen=True, slots=True)
class FitSettings:
    """A machine, what is served on it, and the least speed.

    `hardware` has the bytes of GPU and system memory, and the bytes per second of each; those of the disk
    too, if experts may stay on it. `load` has the tokens of context of a sequence, how many sequences are
    served at once, and the type of the KV cache. Files whose upper bound of speed is below `min_speed` tokens
    per second are left out.
    """

    hardware: Hardware
    load: Load = Load()  # frozen
    min_speed: float = 0.0


def fit(model: Model, settings: FitSettings, progress: Listener | None = None) -> Result[Fit]:
    """Say which files of a model fit on a machine, where their experts go, and how fast they can be.

    `found.best` is None where nothing fits. Speeds are upper bounds: bytes read for a token over bytes per
    second. CheckpointError as `inspect`; PlanError for a load that the model cannot have.
    """
    with listening(progress):
        found = fitting.fit(located(model), settings.hardware, settings.load, settings.min_speed)
        return Result(found, FITTED)
