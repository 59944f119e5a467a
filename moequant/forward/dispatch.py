"""Experts that transformers runs by itself, brought to the function that runs all others.

transformers dispatches most experts to a registered function (`experts`), but not those of DBRX, whose
matrices are flat, nor those of Llama 4, where every expert multiplies every token, most of them zeros, nor
those of Step 3.7, whose activations are clamped, nor those of Switch Transformers, each a module of its own.
On a model of our own such modules give way to `Experts` or `Plain`; nothing of transformers' is changed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moequant.forward.experts import experts_forward


class Experts(nn.Module):
    """Experts as transformers keeps most of them: gate_up_proj [E, 2f, h], down_proj [E, h, f]."""

    def __init__(self, experts: int, width: int, hidden: int, activation: nn.Module) -> None:
        super().__init__()
        self.num_experts, self.act_fn = experts, activation
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """See `experts_forward`; hidden [.., h]."""
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        return experts_forward(self, flat, top_k_index, top_k_weights).view_as(hidden_states)

    def _apply_gate(self, product: Tensor) -> Tensor:
        """What `experts.between` asks of every module of experts."""
        gate, up = product.chunk(2, dim=-1)
        gated: Tensor = self.act_fn(gate) * up
        return gated


class OwnGate(Experts):
    """The same, gated as the module is in whose place they stand."""

    def __init__(self, old: Any) -> None:
        super().__init__(old.num_experts, old.intermediate_dim, old.hidden_dim, old.act_fn)
        self._gated = old._apply_gate

    def _apply_gate(self, product: Tensor) -> Tensor:
        gated: Tensor = self._gated(product)
        return gated


class Plain(nn.Module):
    """Experts of Switch Transformers, which have no gate: up_proj [E, f, h], down_proj [E, h, f]."""

    has_gate = False

    def __init__(self, old: Any) -> None:
        super().__init__()
        one = old["expert_0"]
        self.num_experts, self.act_fn = old.num_experts, one.act
        self.up_proj = nn.Parameter(torch.empty(old.num_experts, *one.wi.weight.shape))
        self.down_proj = nn.Parameter(torch.empty(old.num_experts, *one.wo.weight.shape))

    def forward(self, hidden_states: Tensor, selected: Tensor, weights: Tensor) -> Tensor:
        """Hidden [n, h]; selected i64 [n, 1, E], 1 for the expert of a token, all 0 where that has as many
        of its row's tokens as it may; weights [n, 1]."""
        taken = selected.sum(-1)
        index = torch.where(taken > 0, selected.argmax(-1), self.num_experts)
        return experts_forward(self, hidden_states, index, weights * taken)


class ScaledInputs(nn.Module):
    """Llama 4's block: a router that sends a token to one expert, scaled by its weight; a shared expert."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        old = block.experts
        self.router, self.shared_expert = block.router, block.shared_expert
        self.experts = Experts(old.num_experts, old.expert_dim, old.hidden_size, old.act_fn)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden [.., h] -> the block's output [n, h] and the router's logits [n, E].

        An expert's output counts as it is: its weight is in what it is fed, and so in what is told of it.
        """
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        scores, logits = self.router(flat)  # 0 for all experts but the chosen one
        weight, chosen = scores.topk(1, dim=1)
        routed = self.experts(flat * weight, chosen, torch.ones_like(weight))
        return self.shared_expert(flat) + routed, logits


def dispatch_all(model: nn.Module) -> None:
    """Replace every module of experts that transformers does not dispatch."""
    for name, module in list(model.named_modules()):
        new: nn.Module
        match type(module).__name__:
            case "DbrxExperts":
                old: Any = module
                sizes = (old.num_experts, old.ffn_hidden_size, old.hidden_size)
                new = Experts(*sizes, old.mlp.activation_fn)
            case "Llama4TextMoe":
                new = ScaledInputs(module)
            case "Step3p7Experts":
                new = OwnGate(module)
            case "SwitchTransformersExperts":
                new = Plain(module)
            case _:
                continue
        model.set_submodule(name, new)
