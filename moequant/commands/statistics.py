"""Statistics that a person brings: of `moequant route`, in either version, or an imatrix of llama.cpp."""

from __future__ import annotations

from pathlib import Path

from moequant.checkpoint import Checkpoint
from moequant.commands.settings import Settings
from moequant.containers.gguf import imatrix
from moequant.containers.gguf.export import export
from moequant.containers.gguf.version_1 import renamed
from moequant.errors import FamilyError
from moequant.forward.stream import sites
from moequant.statistics import store
from moequant.statistics.store import Stored
from moequant.values import Calibration, Site


def given_statistics(model: Checkpoint, checkpoint: Checkpoint, settings: Settings) -> Calibration | None:
    """Statistics from a file, when one is named; `checkpoint` is the model as the container cuts it."""
    if settings.stats is not None:
        return load_statistics(model, checkpoint, settings.stats).calibration
    return imatrix.read(settings.imatrix, export(model)) if settings.imatrix is not None else None


def with_all(checkpoint: Checkpoint) -> Checkpoint:
    """The model with the weights that any container makes of it: their sites are what statistics have."""
    try:
        cut = export(checkpoint).weights
    except FamilyError:  # llama.cpp's limits are not those of other containers
        cut = ()
    known = {weight.site for weight in checkpoint.weights}
    return checkpoint.with_weights((*checkpoint.weights, *(w for w in cut if w.site not in known)))


def all_sites(checkpoint: Checkpoint) -> tuple[Site, ...]:
    """Every site whose statistics some container wants."""
    return sites(with_all(checkpoint).weights)


def load_statistics(model: Checkpoint, checkpoint: Checkpoint, path: Path) -> Stored:
    """What `moequant route` saved, if it is of this model and has what every weight of `checkpoint` is fed.

    CorpusError names what differs.
    """
    found = store.load(path)
    if found.version == 1:
        found = renamed(found, model)
    store.check(checkpoint, found)
    return found
