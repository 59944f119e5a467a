"""Routers that score experts alike. Which of those are chosen is then each program's own affair."""

from __future__ import annotations

import torch

from moequant.checkpoint import Checkpoint, load
from moequant.errors import VerifyError, few
from moequant.values import Role


class TiedError(VerifyError):
    """Two programs compute something else, and routers whose scores tie may be all there is to it."""


def check(checkpoint: Checkpoint) -> None:
    """TiedError when routers score experts alike, whatever they are fed."""
    if tied := [number for number in range(checkpoint.n_layers) if _ties(checkpoint, number)]:
        raise TiedError(
            f"not compared with llama.cpp: routers of layers {few(tied)} score experts exactly alike, and "
            "each program chooses among those in its own way"
        )


def _ties(checkpoint: Checkpoint, layer: int) -> bool:
    """Whether two experts of a layer have the same row of the router, and the same bias and correction."""
    own = f"layers.{layer}.router"
    there = [
        weight for weight in checkpoint.weights if weight.name == own or weight.name.startswith(f"{own}.")
    ]
    if not any(weight.role is Role.ROUTER for weight in there):
        return False
    rows = [load(weight).float() for weight in there]
    count = checkpoint.n_experts
    columns = torch.cat([each.reshape(count, -1) for each in rows if each.shape[0] == count], 1)
    return len({tuple(row) for row in columns.tolist()}) < count
