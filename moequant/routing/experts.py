"""The experts function that transformers calls for every MoE block, and what it observes.

transformers dispatches each block's experts to a registered function
(`ALL_EXPERTS_FUNCTIONS`). Ours sorts the tokens by expert, multiplies each expert once,
and, while an `Observer` is attached, sums the moments of what every expert sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moequant.values import InputStats, Weight

EXPERTS = "moequant"
"""Name under which the experts function is registered with transformers."""

OBSERVER_ATTRIBUTE = "moequant_observer"


@dataclass(frozen=True, slots=True)
class Observer:
    """Running sums for the weights that multiply the same activations, see `InputStats` for the fields."""

    sums: InputStats

    @classmethod
    def empty(cls, experts: int, n_in: int) -> Observer:
        """Zero sums for E = `experts` matrices with rows of `n_in`."""
        zeros = torch.zeros(experts, dtype=torch.float64)
        return cls(
            InputStats(
                tokens=torch.zeros(experts, dtype=torch.int64),
                gate_mass=zeros,
                gate_square=zeros.clone(),
                moment=torch.zeros(experts, n_in, dtype=torch.float64),
                gated_moment=torch.zeros(experts, n_in, dtype=torch.float64),
            )
        )

    def add(self, expert: int, inputs: Tensor, gate: Tensor | None) -> None:
        """Add `inputs` [n, in] that `expert` saw with router weights `gate` [n] (None: all 1).

        Products are float32 as computed by the model, sums over at most one batch are
        float64, so that rounding does not grow with the number of tokens.
        """
        sums, n = self.sums, inputs.shape[0]
        squares = inputs.float().square().double()
        moment = squares.sum(0)
        sums.tokens[expert] += n
        sums.moment[expert] += moment
        if gate is None:
            sums.gated_moment[expert] += moment
            sums.gate_mass[expert] += n
            sums.gate_square[expert] += n
            return
        weights = gate.double()
        sums.gated_moment[expert] += weights.square() @ squares
        sums.gate_mass[expert] += weights.sum()
        sums.gate_square[expert] += weights.square().sum()


class FusedExperts(Protocol):
    """What transformers 5 gives every fused experts module: gate_up_proj [E, 2f, h], down_proj [E, h, f]."""

    num_experts: int
    gate_up_proj: Tensor
    down_proj: Tensor

    def _apply_gate(self, gate_up: Tensor) -> Tensor: ...


def experts_forward(
    module: FusedExperts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The weighted sum of each token's experts: hidden [n, h], index and weights [n, k] -> [n, h].

    Experts are visited in order and each multiplies all its tokens at once. The sum over
    a token's experts runs in float32.
    """
    observers: tuple[Observer, Observer] | None = getattr(module, OBSERVER_ATTRIBUTE, None)
    n, k = top_k_index.shape
    slots = top_k_index.reshape(-1)
    order = torch.argsort(slots, stable=True)
    counts = torch.bincount(slots, minlength=module.num_experts).tolist()
    gates = top_k_weights.reshape(-1)
    out = torch.zeros(n, hidden_states.shape[-1], dtype=torch.float32, device=hidden_states.device)
    start = 0
    for expert, count in enumerate(counts):
        if not count:
            continue
        chosen = order[start : start + count]
        start += count
        tokens = torch.div(chosen, k, rounding_mode="floor")
        inputs, gate = hidden_states[tokens], gates[chosen]
        inner = module._apply_gate(linear(inputs, module.gate_up_proj[expert]))
        if observers is not None:
            observers[0].add(expert, inputs, gate)
            observers[1].add(expert, inner, gate)
        result = linear(inner, module.down_proj[expert])
        out.index_add_(0, tokens, result.float() * gate[:, None].float())
    return out.to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register(EXPERTS, experts_forward)


@contextmanager
def observed(model: nn.Module, weights: tuple[Weight, ...]) -> Iterator[dict[str, Observer]]:
    """Observers for every input name of `weights`, attached to the model's modules inside the block.

    A name is a module (its input is observed), `module:out` (its output), or
    `experts:up` and `experts:down` (what the two products of every expert are fed).
    """
    observers: dict[str, Observer] = {}
    for weight in weights:
        if weight.input is not None and weight.input not in observers:
            observers[weight.input] = Observer.empty(weight.n_experts, weight.n_in)
    handles, marked = [], []
    for name, observer in observers.items():
        module_name, _, side = name.partition(":")
        module = model.get_submodule(module_name)
        if side == "up":
            setattr(module, OBSERVER_ATTRIBUTE, (observer, observers[f"{module_name}:down"]))
            marked.append(module)
        elif side == "out":
            handles.append(module.register_forward_hook(_output_hook(observer)))
        elif not side:
            handles.append(module.register_forward_pre_hook(_input_hook(observer)))
    try:
        yield observers
    finally:
        for handle in handles:
            handle.remove()
        for module in marked:
            delattr(module, OBSERVER_ATTRIBUTE)


def _input_hook(observer: Observer) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        observer.add(0, args[0].reshape(-1, args[0].shape[-1]), None)

    return hook


def _output_hook(observer: Observer) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        observer.add(0, output.reshape(-1, output.shape[-1]), None)

    return hook
