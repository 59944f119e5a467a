"""Quantized folders of checkpoints, and a decoder of them that shares nothing with compressed-tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from moequant.checkpoint import open_checkpoint
from moequant.containers import compressed_tensors
from moequant.containers.card import Card
from moequant.containers.folder import convert_folder
from moequant.containers.folder_plan import FolderSettings, group_plan
from moequant.containers.folder_weights import FolderWeights
from moequant.formats import groups
from moequant.formats.groups import GroupFormat
from moequant.quantize import Quantizer
from moequant.values import ExpertLoss


def quantized(
    model: Path, out: Path, quantizer: Quantizer | None = None, **settings: Any
) -> tuple[Card, list[ExpertLoss]]:
    """Convert `model` into the folder `out`."""
    checkpoint, chosen = open_checkpoint(model), FolderSettings(**settings)
    card = Card(checkpoint, group_plan(checkpoint, chosen), chosen)
    losses: list[ExpertLoss] = []
    convert_folder(card, out, quantizer or Quantizer(None), losses)
    return card, losses


def own_decoder(folder: Path) -> FolderWeights:
    """A compressed-tensors folder, decoded by moequant."""
    return FolderWeights(folder, "compressed-tensors", compressed_tensors.SUFFIXES, _decode)


def _decode(config: Mapping[str, Any], stored: Mapping[str, Tensor]) -> Tensor:
    args = config["config_groups"]["group_0"]["weights"]
    fmt = GroupFormat(args["num_bits"], args["group_size"] or -1, (stored["weight_scale"].dtype,))
    n_in = int(stored["weight_shape"][1])
    return groups.decode(fmt, *compressed_tensors.integers(fmt, stored, n_in))
