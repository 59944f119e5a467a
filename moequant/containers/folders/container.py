"""Folders of compressed-tensors and GPTQ as containers."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

from moequant.checkpoint import Checkpoint
from moequant.containers.base import Made, Written
from moequant.containers.folders import write as folder
from moequant.containers.folders.card import Card
from moequant.containers.folders.plan import FolderSettings, scheme_plan, stores
from moequant.containers.folders.read import FolderWeights
from moequant.errors import OutputError
from moequant.values import Packed, Plan


class FolderContainer:
    """A quantized folder of one model; see `containers.base.Container`."""

    is_folder = True

    def __init__(self, checkpoint: Checkpoint, settings: FolderSettings) -> None:
        self.checkpoint, self.settings = checkpoint, settings
        self.notes: tuple[str, ...] = ()

    @cached_property
    def plan(self) -> Plan:
        """All experts in the one scheme of the settings; PlanError for what no loader takes."""
        return scheme_plan(self.checkpoint, self.settings)

    def size(self, plan: Plan) -> int:
        """See `Container`."""
        return folder.folder_bytes(self.checkpoint, plan, self.settings)

    def check_target(self, path: Path, plan: Plan) -> None:
        """See `Container`."""
        folder.check_target(path, self.size(plan))

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

    def describe(self, path: Path, made: Made) -> None:
        """See `Container`."""
        card = Card(self.checkpoint, self.settings, made)
        try:
            (path / "README.md").write_text(card.text(), encoding="utf-8")
        except OSError as error:
            raise OutputError(f"{path}: cannot be written ({error.strerror or error})") from error

    def open(self, path: Path) -> FolderWeights:
        """See `Container`."""
        return folder.OPENERS[self.settings.layout](path)
