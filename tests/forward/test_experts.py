"""The one expert forward: what recorders are told, what they may change, and that nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from moequant.checkpoint import open_checkpoint
from moequant.forward.experts import Rounding, Told, between, by_expert, first_product, last_product
from moequant.forward.model import build_model
from moequant.forward.stream import sites
from moequant.forward.taps import Recorder, recording, watch
from tests import models

BEFORE, INNER = "layers.1.experts.input", "layers.1.experts.inner"


class Everything(Recorder):
    """Keeps all that it is told, and feeds products what `change` makes of their inputs."""

    def __init__(self, change: float = 1.0) -> None:
        self.change = change
        self.inputs: dict[tuple[str, int], Tensor] = {}
        self.outputs: dict[tuple[str, int], Tensor] = {}
        self.gates: dict[int, Tensor] = {}
        self.index = torch.empty(0)

    def routed(self, name: str, hidden: Tensor, index: Tensor, gates: Tensor) -> None:
        assert name == BEFORE
        self.index = index

    def expert(self, name: str, expert: int, inputs: Tensor, gates: Tensor) -> None:
        self.inputs[name, expert], self.gates[expert] = inputs, gates

    def gave(self, site: str, expert: int, outputs: Tensor) -> None:
        self.outputs[site, expert] = outputs

    def fed(self, site: str, inputs: Tensor) -> Tensor:
        return inputs * self.change if site == INNER else inputs


def block(folder) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The experts of layer 1 with their sites, and what a text calls them with."""
    checkpoint = open_checkpoint(folder)
    model = build_model(checkpoint)
    watch(model, sites(weight for weight in checkpoint.weights if weight.is_expert and weight.layer == 1))
    experts = model.get_submodule("model.layers.1.mlp.experts")
    calls: list[tuple[Tensor, ...]] = []
    hook = experts.register_forward_pre_hook(lambda module, args: calls.append(args))
    with torch.inference_mode():
        model(torch.arange(80)[None] % models.VOCAB)
    hook.remove()
    return experts, calls[0]


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
@torch.inference_mode()
def test_what_recorders_are_told_adds_up_to_the_output(tiny, family: str) -> None:
    experts, args = block(tiny(family))
    told = Everything()
    assert isinstance(told, Rounding) and isinstance(told, Told)
    plain = experts(*args)
    with recording(told):
        assert torch.equal(experts(*args), plain), "whoever listens changes nothing"
    total = torch.zeros_like(plain)
    for expert, slots in by_expert(told.index):
        tokens = slots // told.index.shape[1]
        inputs = told.inputs[BEFORE, expert]
        assert torch.equal(inputs, args[0][tokens])
        assert torch.equal(told.outputs[BEFORE, expert], first_product(experts, expert, inputs))
        inner = between(experts, told.outputs[BEFORE, expert])
        assert torch.equal(told.inputs[INNER, expert], inner)
        assert torch.equal(told.outputs[INNER, expert], last_product(experts, expert, inner))
        total.index_add_(0, tokens, told.outputs[INNER, expert] * told.gates[expert][:, None])
    torch.testing.assert_close(total, plain, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_a_recorder_that_rounds_changes_what_products_are_fed(tiny) -> None:
    experts, args = block(tiny("mixtral"))
    plain = experts(*args)
    with recording(Everything(change=0.5)):
        torch.testing.assert_close(experts(*args), plain / 2)
    with recording(Everything(change=0.0)):
        assert not experts(*args).any()
    with recording(Recorder()):
        assert torch.equal(experts(*args), plain)


def test_slots_are_sorted_by_expert_and_then_by_token() -> None:
    index = torch.tensor([[2, 0], [0, 3], [2, 3]])
    found = [(expert, slots.tolist()) for expert, slots in by_expert(index)]
    assert found == [(0, [1, 2]), (2, [0, 4]), (3, [3, 5])]
