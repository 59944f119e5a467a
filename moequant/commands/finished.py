"""Outputs of a run that are finished, and what the next takes from them.

At effort fast nothing but its format decides the bytes of a weight: where two outputs have it in one format,
it is searched once, and read from the first that has its name.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from moequant import formats
from moequant.commands.job import Job
from moequant.containers.base import Written
from moequant.containers.gguf.container import GgufContainer
from moequant.containers.gguf.read import GgufFile
from moequant.errors import MoequantError
from moequant.rounding.diagonal import Quantizer
from moequant.rounding.results import Result
from moequant.rounding.rounder import UNROUNDED
from moequant.values import ExpertLoss, Packed, Weight


@dataclass(frozen=True, slots=True)
class Finished:
    """An output that lies under its name."""

    job: Job
    out: Path
    written: Written
    losses: tuple[ExpertLoss, ...]
    checked: str | None


@dataclass(frozen=True, slots=True)
class Held:
    """A weight as a finished file has it: what it is called there, the CRC-32 of its bytes when they were
    written, and what it lost."""

    file: GgufFile
    name: str
    crc: int
    loss: ExpertLoss

    def read(self) -> Tensor | None:
        """Its packed bytes, u8 [rows, row_bytes]; None where they are no longer what was written."""
        try:
            found = self.file.data(self.name)
        except MoequantError:  # somebody moved the file away, or cut it
            return None
        return torch.from_numpy(found) if zlib.crc32(found.data) == self.crc else None


Holdings = Mapping[tuple[str, str], Held]
"""What finished outputs hold, by a weight and its format."""


def holdings(done: Finished) -> Holdings:
    """The weights of a finished output that another with the same format may have from there.

    Those that cost no search are as soon read from the model; tables are larger than memory. Some formats
    have scales in common with other weights of the output.
    """
    container = done.job.container
    if not isinstance(container, GgufContainer):
        return {}
    try:
        file = GgufFile(done.written.path)
    except MoequantError:  # as in `Held.read`
        return {}
    types, losses = container.formats(done.job.plan), {loss.weight: loss for loss in done.losses}
    found = dict[tuple[str, str], Held]()
    for weight in container.checkpoint.weights:
        kind = types[weight.name]
        if kind in UNROUNDED or weight.is_table or formats.get(kind).shared is not None:
            continue
        theirs, crc = container.exported.names[weight.name], done.written.checksums[weight.name]
        found[weight.name, kind] = Held(file, theirs, crc, losses[weight.name])
    return found


@dataclass(frozen=True, slots=True)
class Sharing(Quantizer):
    """A quantizer that takes over what finished outputs hold, and searches for the rest."""

    held: Holdings = field(default_factory=dict)

    def pack(self, weight: Weight, format_name: str, together: Sequence[Weight] = ()) -> Result:
        """See `Quantizer`."""
        held = self.held.get((weight.name, format_name))
        if held is None or (data := held.read()) is None:
            return Quantizer.pack(self, weight, format_name, together)
        return Packed(weight, format_name, data.reshape(*weight.shape[:-1], -1)), held.loss
