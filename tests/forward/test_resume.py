"""Passes that start at a later layer give what whole passes give."""

from __future__ import annotations

import pytest
import torch

from moequant.checkpoint import open_checkpoint
from moequant.forward.experts import EXPERTS
from moequant.forward.model import build_model
from moequant.forward.resume import Resumable
from tests import models


@pytest.mark.parametrize("family", models.CONFIGS)
def test_every_layer_can_be_the_first(tiny, family: str) -> None:
    checkpoint = open_checkpoint(tiny(family))
    model = build_model(checkpoint, EXPERTS)
    ids = torch.randint(5, models.VOCAB, (3, 40), generator=torch.Generator().manual_seed(0))
    layers_at = checkpoint.family.layers_at
    changed = {name: each for name, each in model.named_parameters() if f"{layers_at}.1." in name}
    with torch.no_grad():
        whole = [model(input_ids=row[None], use_cache=False).logits[0] for row in ids]
        resumable = Resumable(model, layers_at, ids)
        for layer in range(checkpoint.n_layers):
            assert all(map(torch.equal, resumable.logits(layer), whole)), layer
        assert all(map(torch.equal, resumable.base, whole))
        for parameter in changed.values():
            parameter.mul_(1.01)
        found, whole = resumable.logits(1), resumable.logits()
    assert all(map(torch.equal, found, whole))
    assert not any(map(torch.equal, found, resumable.base))
