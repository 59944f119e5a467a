"""Folders of every layout as containers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from moequant.checkpoint import Checkpoint
from moequant.containers.base import Written
from moequant.containers.folders import mxfp4, schemes
from moequant.containers.folders import write as folder
from moequant.containers.folders.inputs import input_scales
from moequant.containers.folders.layouts import LAYOUTS
from moequant.containers.folders.plan import (
    BITS_OF,
    FolderSettings,
    beside_text,
    scheme_plan,
    stores,
    with_copies,
)
from moequant.containers.folders.read import FolderWeights
from moequant.errors import FamilyError, PlanError
from moequant.families.base import PREDICTION
from moequant.values import Calibration, Packed, Plan, Role


class FolderContainer:
    """A quantized folder of one model; see `containers.base.Container`."""

    is_folder = True

    def __init__(self, checkpoint: Checkpoint, settings: FolderSettings) -> None:
        """PlanError for a GGUF file as the source."""
        if checkpoint.gguf is not None:
            raise PlanError(
                f"{checkpoint.gguf}: only GGUF files are made of a GGUF file; folders copy tensors of the "
                "original's safetensors"
            )
        self.checkpoint, self.settings = with_copies(checkpoint), as_released(checkpoint, settings)
        self._sizes: dict[tuple[str, ...], int] = {}
        copied, beside = len(checkpoint.predictions.stored), len(beside_text(checkpoint))
        drafts = f"{PREDICTION} kept: {copied:,} tensors copied as they are, for vLLM to draft with"
        others = f"copied as they are: {beside:,} tensors that text does not need"
        self.notes: tuple[str, ...] = (*([drafts] if copied else []), *([others] if beside else []))

    @cached_property
    def plan(self) -> Plan:
        """All experts in the one scheme of the settings; PlanError for what no loader takes."""
        return scheme_plan(self.checkpoint, self.settings)

    def size(self, plan: Plan) -> int:
        """See `Container`. Headers of 100,000 tensors take seconds to lay out, so what was asked is kept."""
        kinds = tuple(choice.format for choice in plan.choices)
        if kinds not in self._sizes:
            self._sizes[kinds] = folder.folder_bytes(self.checkpoint, plan, self.settings)
        return self._sizes[kinds]

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

    def write(
        self, path: Path, plan: Plan, packed: Iterable[Packed], calibration: Calibration | None = None
    ) -> Written:
        """See `Container`; PlanError where a scheme scales inputs that calibration did not measure."""
        scales = input_scales(self.checkpoint, plan, calibration)
        return folder.write(path, self.checkpoint, plan, self.settings, packed, scales)

    def verify(self, written: Written, plan: Plan) -> None:
        """See `Container`."""
        folder.verify(written, self.checkpoint, plan, self.settings)

    def open(self, path: Path) -> FolderWeights:
        """See `Container`."""
        return LAYOUTS[self.settings.layout].open(path)


def as_released(checkpoint: Checkpoint, settings: FolderSettings) -> FolderSettings:
    """The settings with the layout that a family is released in, where loaders take no other.

    FamilyError for another scheme of it, for a layout that nobody loads, and where what is copied has not the
    names of the release; PlanError for attention, which they read as it is.
    """
    if checkpoint.encodes and settings.layout in BITS_OF:
        raise FamilyError(
            f"{checkpoint.family.name}: only transformers runs it, and transformers loads no "
            f"{settings.layout.upper()} folder; write --format safetensors"
        )
    if checkpoint.family.name != mxfp4.FAMILY:
        return settings
    asked = settings.scheme and schemes.find(settings.scheme)
    if not asked or asked.kind != "MXFP4" or settings.layout != "compressed-tensors":
        raise FamilyError(
            f"{mxfp4.FAMILY}: checkpoints have no name for a single expert, and loaders take all of them as "
            "they are released; --scheme MXFP4A16 writes that, or write GGUF instead"
        )
    biases = (weight for weight in checkpoint.weights if weight.role is Role.BIAS)
    if split := next((weight for weight in biases if len(weight.origin.stored) > 1), None):
        raise FamilyError(
            f"{mxfp4.FAMILY}: {split.origin.stored[0].name}: experts are stored one by one, and loaders take "
            "all of them as they are released; write GGUF instead, or give the release"
        )
    if settings.quantize_attention:
        raise PlanError(
            f"--quantize-attention: loaders of {mxfp4.FAMILY} take its experts alone; leave it out"
        )
    return replace(settings, layout="mxfp4")
