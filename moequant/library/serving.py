"""`moequant.library.fit_folder`: folders for vLLM."""

from __future__ import annotations

from dataclasses import dataclass

from moequant.hub import Model, located
from moequant.inspection import served
from moequant.inspection.served import FolderFit, Gpus
from moequant.progress import Listener, listening
from moequant.report.served import served_json, served_report
from moequant.report.shown import Result, View
from moequant.runtimes.vllm.memory import Serving

__all__ = ["FolderFitSettings", "Gpus", "Serving", "fit_folder"]

SERVED = View("fit", served_report, served_json)


@dataclass(frozen=True, slots=True)
class FolderFitSettings:
    """GPUs, what vLLM serves on them, and what may be made of the model.

    `gpus` has the bytes of memory of each GPU. `serving` has the tokens of context of a sequence, how many
    sequences are served at once, how many GPUs share every weight, and the type of the KV cache. `schemes`,
    by commas, are those to try, and `gpu` is the compute capability of the GPUs.
    """

    gpus: Gpus
    serving: Serving = Serving()  # frozen
    schemes: str | None = None
    gpu: float | None = None


def fit_folder(
    model: Model, settings: FolderFitSettings, progress: Listener | None = None
) -> Result[FolderFit]:
    """Say which folders of a model fit on one or several GPUs when vLLM serves them: as it is stored, in
    every scheme, and in the largest mixture.

    `found.best` is None where nothing fits. Figures follow vLLM's code; speeds are upper bounds.
    CheckpointError as `inspect`; PlanError for a load that the model cannot have.
    """
    with listening(progress):
        found = served.fit_folder(
            located(model), settings.gpus, settings.serving, settings.schemes, settings.gpu
        )
        return Result(found, SERVED)
