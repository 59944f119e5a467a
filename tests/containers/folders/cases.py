"""Quantized folders of checkpoints, and a decoder of them that shares nothing with compressed-tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from moequant.commands.convert_folder import pack_all
from torch import Tensor

from moequant.checkpoint import open_checkpoint
from moequant.commands.convert import Settings
from moequant.containers.folders import compressed_tensors
from moequant.containers.folders import write as container
from moequant.containers.folders.card import Card
from moequant.containers.folders.plan import FolderSettings, group_plan
from moequant.containers.folders.read import FolderWeights
from moequant.files import atomic_folder
from moequant.formats import groups
from moequant.formats.groups import GroupFormat
from moequant.values import Calibration, ExpertLoss

FAST = Settings()
"""A card without text for Hessians is rounded by the plain search, at the effort of these."""


def convert(card: Card, out: Path, settings: Settings = FAST, overwrite: bool = False) -> list[ExpertLoss]:
    """The card's plan at `out` as `conversion_folder` makes it: by the plain search, where it has no text."""
    container.check_target(
        out,
        container.folder_bytes(card.checkpoint, card.plan, card.settings),
        overwrite,
        card.checkpoint.path,
    )
    losses: list[ExpertLoss] = []
    with atomic_folder(out, overwrite) as partial:
        written = container.write(partial, card, pack_all(card, settings, losses))
        container.verify(written, card.checkpoint, card.plan, card.settings)
    return losses


def card_of(model: Path, **settings: Any) -> Card:
    """What a folder of `model` will be."""
    checkpoint, chosen = open_checkpoint(model), FolderSettings(**settings)
    return Card(checkpoint, group_plan(checkpoint, chosen), chosen)


def quantized(
    model: Path, out: Path, calibration: Calibration | None = None, **settings: Any
) -> tuple[Card, list[ExpertLoss]]:
    """Convert `model` into the folder `out` by the plain search."""
    card = replace(card_of(model, **settings), calibration=calibration)
    return card, convert(card, out)


def own_decoder(folder: Path) -> FolderWeights:
    """A compressed-tensors folder, decoded by moequant."""
    return FolderWeights(folder, "compressed-tensors", compressed_tensors.SUFFIXES, _decode)


def _decode(config: Mapping[str, Any], stored: Mapping[str, Tensor]) -> Tensor:
    args = config["config_groups"]["group_0"]["weights"]
    fmt = GroupFormat(args["num_bits"], args["group_size"] or -1, (stored["weight_scale"].dtype,))
    n_in = int(stored["weight_shape"][1])
    return groups.decode(fmt, *compressed_tensors.integers(fmt, stored, n_in))
