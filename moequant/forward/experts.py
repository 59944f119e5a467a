"""The experts function that transformers calls for every MoE block.

transformers dispatches each block's experts to a registered function
(`ALL_EXPERTS_FUNCTIONS`). Ours sorts the tokens by expert, multiplies each expert once,
and tells the current recorder what every expert sees.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moequant.forward.taps import NAME, recorder

EXPERTS = "moequant"
"""Name under which the experts function is registered with transformers."""


class FusedExperts(Protocol):
    """What transformers 5 gives every fused experts module: gate_up_proj [E, 2f, h], down_proj [E, h, f]."""

    num_experts: int
    gate_up_proj: Tensor
    down_proj: Tensor

    def _apply_gate(self, gate_up: Tensor) -> Tensor: ...


def by_expert(index: Tensor, experts: int) -> list[tuple[int, Tensor]]:
    """(expert, its slots i64 [m]) for every expert that was chosen; a slot is token·k + choice.

    index i64 [n, k]. Slots are in the order of the tokens.
    """
    slots = index.reshape(-1)
    order = torch.argsort(slots, stable=True)
    counts = torch.bincount(slots, minlength=experts).tolist()
    return [(expert, chosen) for expert, chosen in enumerate(torch.split(order, counts)) if len(chosen)]


def experts_forward(
    module: FusedExperts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The weighted sum of each token's experts: hidden [n, h], index and weights [n, k] -> [n, h].

    Experts are visited in order and each multiplies all its tokens at once. Weights may be
    stored narrower than the hidden states; the sum over a token's experts runs in float32.
    """
    told, name = recorder(), getattr(module, NAME, None)
    if told is not None and name is not None:
        told.routed(name, hidden_states, top_k_index, top_k_weights)
    n, k = top_k_index.shape
    gates = top_k_weights.reshape(-1)
    dtype = hidden_states.dtype
    out = torch.zeros(n, hidden_states.shape[-1], dtype=torch.float32, device=hidden_states.device)
    for expert, chosen in by_expert(top_k_index, module.num_experts):
        tokens = torch.div(chosen, k, rounding_mode="floor")
        inputs, gate = hidden_states[tokens], gates[chosen]
        inner = module._apply_gate(linear(inputs, module.gate_up_proj[expert].to(dtype)))
        if told is not None and name is not None:
            told.expert(f"{name}:up", expert, inputs, gate)
            told.expert(f"{name}:down", expert, inner, gate)
        result = linear(inner, module.down_proj[expert].to(dtype))
        out.index_add_(0, tokens, result.float() * gate[:, None].float())
    return out.to(dtype)


ALL_EXPERTS_FUNCTIONS.register(EXPERTS, experts_forward)
