"""Experts that transformers does not dispatch: the same outputs, and recorders are told of every one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moequant.checkpoint import open_checkpoint
from moequant.forward.dispatch import Experts, ScaledInputs
from moequant.forward.model import build_model
from moequant.forward.stream import sites
from moequant.forward.taps import Recorder, recording, watch
from tests import models


class Told(Recorder):
    """Keeps what experts of layer 1 are told to be fed."""

    def __init__(self) -> None:
        self.inputs: dict[str, list[Tensor]] = {}
        self.gates: list[Tensor] = []

    def expert(self, name: str, expert: int, inputs: Tensor, gates: Tensor) -> None:
        if name.startswith("layers.1."):
            self.inputs.setdefault(name, []).append(inputs)
            self.gates.append(gates)


@pytest.mark.parametrize("family", ["dbrx", "llama4", "step3p7"])
def test_a_replaced_block_gives_what_transformers_does(tiny, family: str) -> None:
    theirs = models.reference(tiny(family))
    ours = build_model(open_checkpoint(tiny(family)))
    assert any(isinstance(module, Experts) for module in ours.modules())
    assert not any(isinstance(module, Experts | ScaledInputs) for module in theirs.modules())
    ids = torch.randint(0, models.VOCAB, (2, 48), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        found, wanted = (model(ids, use_cache=False).logits for model in (ours, theirs))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_an_expert_of_llama_4_is_fed_its_token_times_the_routers_weight(tiny) -> None:
    checkpoint = open_checkpoint(tiny("llama4"))
    model, told = build_model(checkpoint), Told()
    watch(model, sites(checkpoint.weights))
    block, seen = model.get_submodule("model.layers.1.feed_forward"), list[Tensor]()
    block.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, -2)))
    ids = torch.randint(0, models.VOCAB, (1, 32), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), recording(told):
        model(ids, use_cache=False)
        weight = torch.sigmoid(block.router(seen[0])[1].amax(1, keepdim=True))
    fed = torch.cat(told.inputs["layers.1.experts.input"])
    order = torch.argsort(fed[:, 0]), torch.argsort((seen[0] * weight)[:, 0])
    torch.testing.assert_close(fed[order[0]], (seen[0] * weight)[order[1]])
    assert all(bool((gates == 1).all()) for gates in told.gates)
