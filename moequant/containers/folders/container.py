"""Folders of compressed-tensors and GPTQ as containers."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

from moequant.checkpoint import Checkpoint
from moequant.containers.base import Written
from moequant.containers.folders import write as folder
from moequant.containers.folders.plan import FolderSettings, scheme_plan, stores, with_copies
from moequant.containers.folders.read import FolderWeights
from moequant.families.base import PREDICTION
from moequant.values import Packed, Plan


class FolderContainer:
    """A quantized folder of one model; see `containers.base.Container`."""

    is_folder = True

    def __init__(self, checkpoint: Checkpoint, settings: FolderSettings) -> None:
        self.checkpoint, self.settings = with_copies(checkpoint), settings
        copied = len(checkpoint.predictions.stored)
        self.notes: tuple[str, ...] = (
            (f"{PREDICTION} kept: {copied:,} tensors copied as they are, for vLLM to draft with",)
            if copied
            else ()
        )

    @cached_property
    def plan(self) -> Plan:
        """All experts in the one scheme of the settings; PlanError for what no loader takes."""
        return scheme_plan(self.checkpoint, self.settings)

    def size(self, plan: Plan) -> int:
        """See `Container`."""
        return folder.folder_bytes(self.checkpoint, plan, self.settings)

    def parts(self, plan: Plan) -> tuple[int, ...]:
        """See `Container`: a folder is one thing, whatever is in it."""
        return (self.size(plan),)

    def check_target(self, path: Path, plan: Plan) -> None:
        """See `Container`."""
        folder.check_target(path, self.checkpoint, plan, self.settings)

    def formats(self, plan: Plan) -> dict[str, str]:
        """See `Container`: what has a scheme; all else is copied as bytes."""
        rows = {weight.name: weight.n_in for weight in self.checkpoint.weights}
        found = stores(self.checkpoint, plan, self.settings.layout)
        return {name: storage.block_format(rows[name]) for name, storage in found.items()}

    def write(self, path: Path, plan: Plan, packed: Iterable[Packed]) -> Written:
        """See `Container`."""
        return folder.write(path, self.checkpoint, plan, self.settings, packed)

    def verify(self, written: Written, plan: Plan) -> None:
        """See `Container`."""
        folder.verify(written, self.checkpoint, plan, self.settings)

    def open(self, path: Path) -> FolderWeights:
        """See `Container`."""
        return folder.OPENERS[self.settings.layout](path)
