"""Quantized folders of checkpoints, and a decoder of them that shares nothing with compressed-tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from moequant.checkpoint import open_checkpoint
from moequant.containers.folders import compressed_tensors
from moequant.containers.folders.container import FolderContainer
from moequant.containers.folders.plan import FolderSettings
from moequant.containers.folders.read import FolderWeights
from moequant.files import atomic_folder, claim
from moequant.formats import groups
from moequant.formats.groups import GroupFormat
from moequant.report import Conversion, How, Report, card
from moequant.rounding.diagonal import Quantizer, pack_all
from moequant.values import Calibration, ExpertLoss, Packed


def folder_of(model: Path, **settings: Any) -> FolderContainer:
    """What a folder of `model` will be."""
    return FolderContainer(open_checkpoint(model), FolderSettings(**settings))


def packed(
    folder: FolderContainer, losses: list[ExpertLoss], calibration: Calibration | None = None
) -> Iterator[Packed]:
    """The folder's integers by the plain search; what it cost goes to `losses`."""
    for item, loss in pack_all(folder.checkpoint, folder.formats(folder.plan), Quantizer(calibration)):
        losses.append(loss)
        yield item


def convert(
    folder: FolderContainer, out: Path, calibration: Calibration | None = None, overwrite: bool = False
) -> list[ExpertLoss]:
    """The folder at `out`, as a conversion makes it but for the text that Hessians want."""
    losses: list[ExpertLoss] = []
    with claim(folder=out, overwrite=overwrite, inputs=(folder.checkpoint.path,)):
        folder.check_target(out, folder.plan)
        with atomic_folder(out) as partial:
            written = folder.write(partial, folder.plan, packed(folder, losses, calibration))
            folder.verify(written, folder.plan)
            files = Report(
                folder.checkpoint.path, out, written.bytes, folder.checkpoint, folder.plan, calibration
            )
            card.write(Conversion((replace(files, how=How(folder=folder.settings)),)), partial / "README.md")
    return losses


def quantized(
    model: Path, out: Path, calibration: Calibration | None = None, **settings: Any
) -> tuple[FolderContainer, list[ExpertLoss]]:
    """Convert `model` into the folder `out` by the plain search."""
    folder = folder_of(model, **settings)
    return folder, convert(folder, out, calibration)


def own_decoder(folder: Path) -> FolderWeights:
    """A compressed-tensors folder, decoded by moequant."""
    return FolderWeights(folder, "compressed-tensors", compressed_tensors.SUFFIXES, _decode)


def _decode(config: Mapping[str, Any], stored: Mapping[str, Tensor]) -> Tensor:
    args = config["config_groups"]["group_0"]["weights"]
    fmt = GroupFormat(args["num_bits"], args["group_size"] or -1, (stored["weight_scale"].dtype,))
    n_in = int(stored["weight_shape"][1])
    return groups.decode(fmt, *compressed_tensors.integers(fmt, stored, n_in))
