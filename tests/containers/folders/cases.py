"""Quantized folders of checkpoints, and a decoder of them that shares nothing with compressed-tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moequant.checkpoint import open_checkpoint
from moequant.containers.folders import compressed_tensors, schemes
from moequant.containers.folders import storage as storages
from moequant.containers.folders.container import FolderContainer
from moequant.containers.folders.plan import FolderSettings
from moequant.containers.folders.read import Decode, FolderWeights
from moequant.files import atomic_folder, claim
from moequant.report import card
from moequant.report.conversion import Conversion
from moequant.report.summary import How, Report
from moequant.rounding.diagonal import Quantizer, pack_all
from moequant.values import Calibration, ExpertLoss, Packed
from tests import models


def released(tiny: Callable[[str], Path], root: Path, family: str) -> Path:
    """The model with the layers that predict, where its release has some."""
    if family not in models.PREDICTIONS:
        return tiny(family)
    return models.as_released(models.build(root / "model", family), family)


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
            written = folder.write(partial, folder.plan, packed(folder, losses, calibration), calibration)
            folder.verify(written, folder.plan)
            files = Report(
                folder.checkpoint.path, out, written.bytes, folder.checkpoint, folder.plan, calibration
            )
            made = Conversion((replace(files, how=How(folder=folder.settings)),))
            card.write(card.text(made, partial), partial / "README.md")
    return losses


def quantized(
    model: Path, out: Path, calibration: Calibration | None = None, **settings: Any
) -> tuple[FolderContainer, list[ExpertLoss]]:
    """Convert `model` into the folder `out` by the plain search."""
    folder = folder_of(model, **settings)
    return folder, convert(folder, out, calibration)


def own_decoder(folder: Path) -> FolderWeights:
    """A compressed-tensors folder, decoded by moequant."""
    return FolderWeights(folder, "compressed-tensors", _decoder)


def _decoder(config: Mapping[str, Any]) -> Decode:
    def decode(module: str, stored: Mapping[str, Tensor]) -> Tensor:
        group = compressed_tensors.group_of(config, module)
        dtype = stored["weight_scale"].dtype
        dtype = dtype if dtype.is_floating_point and dtype.itemsize == 2 else torch.bfloat16
        storage = schemes.of_config(group, group["format"]).storage((dtype,))
        codes = stored.get("weight_packed", stored.get("weight"))
        assert codes is not None
        per_byte = 1 if "weight" in stored else 2
        n_in = int(stored["weight_shape"][1]) if "weight_shape" in stored else codes.shape[1] * per_byte
        return storages.decode(storage, stored, n_in).to(dtype)

    return decode
