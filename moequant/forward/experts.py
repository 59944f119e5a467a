"""The experts function that transformers calls for every MoE block: the one expert forward of moequant.

transformers dispatches each block's experts to a registered function (`ALL_EXPERTS_FUNCTIONS`) and says on
the module how they are kept: transposed, with biases, without a gate, with a norm behind. Ours sorts the
tokens by expert, multiplies each expert once, and tells the current recorder what every expert sees. A
recorder may also change what the products are fed (`Rounding`), see what they give (`Told`), or know what all
of them together give (`Known`). `part` is a module with some of the experts, and `Route` says what is sent to
them, for those who run them in turn.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import linear

from moequant.forward.taps import SEEN, Seen, recorder

EXPERTS = "moequant"
"""Name under which the experts function is registered with transformers."""


@runtime_checkable
class Rounding(Protocol):
    """A recorder that also says what the products of a site are really fed."""

    def fed(self, site: str, inputs: Tensor) -> Tensor:
        """The inputs as a kernel sees them."""


@runtime_checkable
class Told(Protocol):
    """A recorder that also sees what an expert's products give, before the router's weight scales it."""

    def gave(self, site: str, expert: int, outputs: Tensor) -> None:
        """Outputs [m, out] of the product whose inputs are seen at `site`."""


@runtime_checkable
class Known(Protocol):
    """A recorder that knows what a token's experts give together, so that nothing is multiplied."""

    def given(self, hidden: Tensor) -> Tensor:
        """The weighted sum [n, h] for the tokens hidden [n, h]."""


def by_expert(index: Tensor) -> list[tuple[int, Tensor]]:
    """(expert, its slots i64 [m]) for every expert that was chosen; a slot is token·k + choice.

    index i64 [n, k]. Slots are in the order of the tokens.
    """
    slots = index.reshape(-1)
    order = torch.argsort(slots, stable=True)
    counts = torch.bincount(slots).tolist()
    return [(expert, chosen) for expert, chosen in enumerate(torch.split(order, counts)) if len(chosen)]


@dataclass(frozen=True)
class Route:
    """Where a router sends the tokens of a batch: index i64 [n, k] and the router's weights [n, k]; see
    `Recorder.routed`."""

    index: Tensor
    gates: Tensor

    @cached_property
    def sent(self) -> list[tuple[int, Tensor]]:
        """See `by_expert`: sorted once, however few experts are asked for at a time."""
        return by_expert(self.index)

    def to(self, experts: range) -> dict[int, tuple[Tensor, Tensor]]:
        """Tokens i64 [m] and weights [m] of each of these experts that has any, in the order of experts."""
        flat, k = self.gates.reshape(-1), self.index.shape[1]
        return {
            expert: (torch.div(chosen, k, rounding_mode="floor"), flat[chosen])
            for expert, chosen in self.sent
            if expert in experts
        }

    def on(self, device: str) -> Route:
        """The same on that device."""
        return Route(self.index.to(device), self.gates.to(device))


def first_product(module: nn.Module, expert: int, inputs: Tensor) -> Tensor:
    """What one expert's gate and up (or up alone) make of inputs [m, h]."""
    return _product(module, "gate_up_proj" if _has(module, "has_gate") else "up_proj", expert, inputs)


def between(module: nn.Module, product: Tensor) -> Tensor:
    """What the second product is fed: the gated activations [m, f]."""
    inner: Tensor = module._apply_gate(product) if _has(module, "has_gate") else module.act_fn(product)  # type: ignore[operator]
    return inner


def last_product(module: nn.Module, expert: int, inner: Tensor) -> Tensor:
    """What one expert gives [m, h]."""
    out = _product(module, "down_proj", expert, inner)
    if _has(module, "has_post_expert_norm"):
        out = module.post_expert_norm(out)  # type: ignore[operator]
    return out


def part(module: nn.Module, experts: range) -> nn.Module:
    """A module of experts with these alone, numbered from 0; it shares the memory of what is in memory."""
    made, these = copy.copy(module), slice(experts.start, experts.stop)
    made._parameters = {
        name: None if whole is None else nn.Parameter(whole[these], requires_grad=False)
        for name, whole in module._parameters.items()
    }
    made.num_experts = len(experts)  # type: ignore[assignment]
    return made


def add_output(total: Tensor, tokens: Tensor, result: Tensor, gates: Tensor) -> None:
    """Add what an expert gives its tokens, result [m, h] times the router's weights [m], to f32 [n, h]."""
    total.index_add_(0, tokens, result.float() * gates[:, None].float())


def experts_forward(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The weighted sum of each token's experts: hidden [n, h], index and weights [n, k] -> [n, h].

    Experts are visited in order and each multiplies all its tokens at once. Weights may be
    stored narrower than the hidden states; the sum over a token's experts runs in float32.
    """
    told, sites = recorder(), getattr(module, SEEN, None)
    fed = hidden_states
    if told is not None and sites is not None:
        told.routed(sites.before, hidden_states, top_k_index, top_k_weights)
        if isinstance(told, Known):
            return told.given(hidden_states)
        fed = told.fed(sites.before, fed) if isinstance(told, Rounding) else fed
    out = torch.zeros(hidden_states.shape, dtype=torch.float32, device=hidden_states.device)
    every = range(int(module.num_experts))  # type: ignore[arg-type]
    add_experts(out, module, fed, Route(top_k_index, top_k_weights).to(every))
    return out.to(hidden_states.dtype)


def add_experts(
    total: Tensor, module: nn.Module, fed: Tensor, sent: Mapping[int, tuple[Tensor, Tensor]], first: int = 0
) -> None:
    """Add what experts give to the sum over each token's experts, f32 [n, h], in the order of `sent`.

    `fed` [n, h] is what all products are fed, `sent` a `Route` to those of the experts that `module` has; its
    own are numbered from `first`. The current recorder is told.
    """
    sites: Seen | None = getattr(module, SEEN, None)
    for expert, (tokens, gates) in sent.items():
        result = _one(module, expert - first, expert, fed[tokens], gates, sites)
        add_output(total, tokens, result, gates)


def _one(
    module: nn.Module, at: int, expert: int, inputs: Tensor, gates: Tensor, sites: Seen | None
) -> Tensor:
    """One expert, which the module has `at` a place, on its tokens, with everything told that somebody wants
    to know."""
    told = recorder() if sites is not None else None
    if told is None or sites is None:
        return last_product(module, at, between(module, first_product(module, at, inputs)))
    told.expert(sites.before, expert, inputs, gates)
    product = first_product(module, at, inputs)
    if isinstance(told, Told):
        told.gave(sites.before, expert, product)
    inner = between(module, product)
    if isinstance(told, Rounding):
        inner = told.fed(sites.inner, inner)
    told.expert(sites.inner, expert, inner, gates)
    result = last_product(module, at, inner)
    if isinstance(told, Told):
        told.gave(sites.inner, expert, result)
    return result


def _product(module: nn.Module, name: str, expert: int, inputs: Tensor) -> Tensor:
    weight = getattr(module, name)[expert].to(inputs.dtype)
    weight = weight.T if _has(module, "is_transposed") else weight
    bias: Any = getattr(module, f"{name}_bias")[expert].to(inputs.dtype) if _has(module, "has_bias") else None
    return linear(inputs, weight, bias)


def _has(module: nn.Module, what: str) -> bool:
    """What transformers says of an experts module; modules that do not say have gates and nothing else."""
    return bool(getattr(module, what, what == "has_gate"))


def register() -> None:
    """Give transformers the function, before a model is made that names it; a second time changes nothing."""
    transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS.register(EXPERTS, experts_forward)
