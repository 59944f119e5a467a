"""The calibration pass: text through the model's own forward, every weight's inputs measured."""

from __future__ import annotations

import torch
from tqdm import tqdm

from moequant.checkpoint import Checkpoint, load, not_finite
from moequant.corpus import Rows
from moequant.errors import CheckpointError
from moequant.routing.experts import EXPERTS, observed
from moequant.routing.model import build_model
from moequant.values import Calibration, Role, RouteStats

BATCH_TOKENS = 4096
"""Tokens per forward pass: enough for efficient products, few enough to bound the activations."""


def calibrate(checkpoint: Checkpoint, rows: Rows) -> Calibration:
    """Route `rows` through the checkpoint and collect the moments of every weight's inputs.

    Raises CheckpointError naming the tensor when the activations are not finite because
    a weight is not.
    """
    model = build_model(checkpoint, EXPERTS)
    per_batch = max(1, BATCH_TOKENS // rows.ids.shape[1])
    with torch.inference_mode(), observed(model, checkpoint.weights) as observers:
        progress = tqdm(total=rows.ids.numel(), unit="tok", desc="calibrate", disable=None, leave=False)
        for batch in torch.split(rows.ids, per_batch):
            model(input_ids=batch, use_cache=False, logits_to_keep=1)
            progress.update(batch.numel())
        progress.close()
        inputs = {name: observer.sums for name, observer in observers.items()}
    if not all(torch.isfinite(sums.moment).all() for sums in inputs.values()):
        _blame(checkpoint)
    routes = tuple(
        RouteStats(weight.layer or 0, inputs[weight.input].tokens, inputs[weight.input].gate_mass)
        for weight in checkpoint.weights
        if weight.role is Role.GATE and weight.input is not None
    )
    return Calibration(routes, inputs, rows.ids.shape[0], rows.ids.numel(), rows.source)


def _blame(checkpoint: Checkpoint) -> None:
    """Name the tensor that makes the activations non-finite: read only when they are."""
    for weight in checkpoint.weights:
        if found := not_finite(weight, load(weight)):
            raise CheckpointError(found)
    raise CheckpointError("activations overflow during calibration, though all weights are finite")
