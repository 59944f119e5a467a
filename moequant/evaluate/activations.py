"""Activations as llama.cpp's CPU kernels see them: rounded before they meet quantized weights.

ggml multiplies packed weights with integers, so it rounds the other side of every product as
well (type_traits_cpu.vec_dot_type in ggml-cpu): blocks of 256 with a float32 scale for K- and
I-types, blocks of 32 with a float16 scale for the older ones, and the weights' own precision
for 16-bit files. With this a file's perplexity here is the one that the runtime will show.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moequant.checkpoint import Checkpoint
from moequant.errors import VerifyError
from moequant.forward.experts import FusedExperts, experts_forward
from moequant.forward.taps import NAME, recorder
from moequant.values import Role

EXPERTS = "moequant-rounded"
"""Name under which the experts function of this module is registered with transformers."""

Rounding = Callable[[Tensor], Tensor]

_BY_32 = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4", "NVFP4")
_NARROW = {"F16": torch.float16, "BF16": torch.bfloat16}


def by_32(inputs: Tensor) -> Tensor:
    """ggml's Q8_0 and back: [..., n], 32 divides n."""
    blocks = inputs.reshape(*inputs.shape[:-1], -1, 32)
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    codes = torch.round(blocks / scale.clamp_min(1e-30))
    return (codes * scale.half().float()).view_as(inputs)


def by_256(inputs: Tensor) -> Tensor:
    """ggml's Q8_K and back: [..., n], 256 divides n. The extreme value becomes -127, whatever its sign."""
    blocks = inputs.reshape(*inputs.shape[:-1], -1, 256)
    extreme = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    scale = torch.where(extreme == 0, 1.0, extreme / -127)
    return (torch.round(blocks / scale).clamp_max(127) * scale).view_as(inputs)


def rounding(type_: str) -> Rounding | None:
    """What ggml does to the activations that meet weights of that type; None when nothing."""
    if type_ == "F32":
        return None
    if type_ in _NARROW:
        return lambda inputs: inputs.to(_NARROW[type_]).float()
    return by_32 if type_ in _BY_32 else by_256


class Rounded:
    """The roundings of one file by the name of the module, or side of the experts, that they come before."""

    def __init__(self, checkpoint: Checkpoint, types: Mapping[str, str]) -> None:
        found: dict[str, set[Rounding | None]] = {}
        names: dict[str, str] = {}
        for weight in checkpoint.weights:
            if weight.input is None and not (checkpoint.tied and weight.role is Role.EMBEDDING):
                continue  # norms, routers and look-ups are exact
            place = weight.input if weight.role.is_expert else weight.param.removesuffix(".weight")
            if weight.role is Role.EMBEDDING:
                place = "lm_head"
            assert place is not None
            found.setdefault(place, set()).add(rounding(types[weight.name]))
            names[place] = weight.name
        self.by_place: dict[str, Rounding] = {}
        for place, kinds in found.items():
            if len(kinds) > 1:
                raise VerifyError(
                    f"{names[place]}: its sibling's type asks for another rounding of their input"
                )
            (kind,) = kinds
            if kind is not None:
                self.by_place[place] = kind

    def __call__(self, place: str, inputs: Tensor) -> Tensor:
        """The inputs as the kernels see them."""
        kind = self.by_place.get(place)
        return inputs if kind is None else kind(inputs)


def current() -> Rounded | None:
    """What the calling thread's recorder asks for."""
    found: Rounded | None = getattr(recorder(), "rounded", None)
    return found


def listen(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Make every linear module of the model round its input when the current recorder asks for it."""
    for place in sorted({weight.param.removesuffix(".weight") for weight in checkpoint.weights}):
        owner, _, last = place.rpartition(".")  # of fused experts the last part is a parameter
        module = getattr(model.get_submodule(owner), last)
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(_hook(place))
    if checkpoint.tied:
        model.get_submodule("lm_head").register_forward_pre_hook(_hook("lm_head"))


def _hook(place: str) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...] | None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        wanted = current()
        return None if wanted is None else (wanted(place, args[0]), *args[1:])

    return hook


class _Between:
    """An experts module whose second product is fed rounded inputs."""

    def __init__(self, module: FusedExperts, place: str, wanted: Rounded) -> None:
        self.num_experts = module.num_experts
        self.gate_up_proj, self.down_proj = module.gate_up_proj, module.down_proj
        self._gate, self._place, self._wanted = module._apply_gate, place, wanted
        setattr(self, NAME, place)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        return self._wanted(f"{self._place}:down", self._gate(gate_up))


def rounded_experts(
    module: FusedExperts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """`experts_forward` with both products' inputs rounded, if the current recorder asks for it."""
    wanted, place = current(), getattr(module, NAME, None)
    if wanted is None or place is None:
        return experts_forward(module, hidden_states, top_k_index, top_k_weights)
    between = _Between(module, place, wanted)
    return experts_forward(between, wanted(f"{place}:up", hidden_states), top_k_index, top_k_weights)


ALL_EXPERTS_FUNCTIONS.register(EXPERTS, rounded_experts)
