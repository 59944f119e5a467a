"""Statistics of version 1, which had llama.cpp's keys and the modules of transformers for names."""

from __future__ import annotations

from dataclasses import replace

from moequant.checkpoint import Checkpoint
from moequant.containers.gguf.export import export
from moequant.errors import CorpusError
from moequant.statistics.store import VERSION, Stored, identity
from moequant.values import Site

_SIDES = {"input": "", "output": ":out", "experts": ":up", "inner": ":down"}


def renamed(found: Stored, checkpoint: Checkpoint) -> Stored:
    """The same statistics under today's names. CorpusError when they are of another model."""
    exported = export(checkpoint.without_predictions())
    mine = {
        "general.architecture": exported.arch,
        "vocab_size": checkpoint.shape.vocab,
        **exported.metadata,
    }
    for key in sorted(found.model.keys() & mine.keys()):
        if found.model[key] != mine[key]:
            raise CorpusError(
                f"{found.origin}: statistics of another model than {checkpoint.path}: {key} is "
                f"{found.model[key]}, not {mine[key]}"
            )
    weights = (*checkpoint.weights, *exported.weights)
    names = {_old(weight.site): weight.site.name for weight in weights if weight.site is not None}
    inputs = {names.get(name, name): stats for name, stats in found.calibration.inputs.items()}
    calibration = replace(found.calibration, inputs=inputs)
    return Stored(identity(checkpoint), calibration, found.origin, VERSION)


def _old(site: Site) -> str:
    return site.module + _SIDES[site.side]
