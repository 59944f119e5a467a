"""Activations as a runtime's kernels see them: rounded before they meet quantized weights.

ggml multiplies packed weights with integers, so it rounds the other side of every product as
well (type_traits_cpu.vec_dot_type in ggml-cpu): blocks of 256 with a float32 scale for K- and
I-types, blocks of 32 with a float16 scale for the older ones, and the weights' own precision
for 16-bit files. With this a file's perplexity here is the one that the runtime will show.

Folders say in their config what becomes of activations (`checkpoint.codecs.inputs`), and vLLM does it: a
scale for each token, or for 128 channels of one, that puts the largest at the end of the range. Where scales
come from calibration, one number of the folder serves all that a layer's experts are fed (`folder_inputs`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial

import torch
from torch import Tensor, nn

from moequant.checkpoint import Checkpoint
from moequant.checkpoint.codecs.inputs import Inputs
from moequant.errors import VerifyError
from moequant.forward.taps import recorder
from moequant.values import Role

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


def dynamic(inputs: Tensor, told: Inputs) -> Tensor:
    """FP8 (e4m3) or int8 and back: [..., n], a scale for each `told.group` channels (the last may be fewer),
    all of them where it is 0."""
    width = inputs.shape[-1]
    group = told.group or width
    blocks = _blocks(inputs, group)
    top = 448.0 if told.numbers == "FP8" else 127.0
    reach = blocks.abs().amax(-1, keepdim=True)
    if told.most is not None:
        reach = reach.clamp_max(told.most)
    scale = (reach / top).clamp_min(1e-12)
    if told.power:
        scale = scale.log2().ceil().exp2()
    codes = (blocks / scale).clamp(-top, top)
    codes = codes.to(torch.float8_e4m3fn).to(inputs.dtype) if told.numbers == "FP8" else codes.round()
    return (codes * scale).flatten(-2)[..., :width]


def fixed(inputs: Tensor, scale: float) -> Tensor:
    """FP8 (e4m3) and back under one scale: [..., n]; what is beyond 448 of it is cut off."""
    codes = (inputs / scale).clamp(-448.0, 448.0)
    return codes.to(torch.float8_e4m3fn).to(inputs.dtype) * scale


def nvfp4(inputs: Tensor, divisor: float) -> Tensor:
    """NVFP4 and back: [..., n], an e4m3 scale for each 16 channels (the last may be fewer), which `divisor`
    divides."""
    blocks = _blocks(inputs, 16)
    reach = (blocks.abs().amax(-1, keepdim=True) * (divisor / 6)).clamp_max(448.0)
    scale = reach.to(torch.float8_e4m3fn).to(inputs.dtype) / divisor
    return _e2m1(blocks, scale).flatten(-2)[..., : inputs.shape[-1]]


def mxfp4(inputs: Tensor) -> Tensor:
    """MXFP4 and back: [..., n], a power of two for each 32 channels (the last may be fewer).

    It puts the largest below 8, from 7 on a power higher; what is then beyond 6 is cut off. So does vLLM's
    kernel (`cvt_warp_fp16_to_fp4` in csrc, read), and compressed-tensors.
    """
    blocks = _blocks(inputs, 32)
    reach = blocks.abs().amax(-1, keepdim=True).frexp()
    exponent = reach.exponent - 3 + (reach.mantissa >= 0.875)
    scale = torch.ldexp(torch.ones_like(reach.mantissa), exponent.clamp(-126, 127))
    return _e2m1(blocks, scale).flatten(-2)[..., : inputs.shape[-1]]


def _blocks(inputs: Tensor, size: int) -> Tensor:
    """[..., n] -> [..., n / size, size], the last filled up with zeros."""
    padded = nn.functional.pad(inputs, (0, -inputs.shape[-1] % size))
    return padded.reshape(*inputs.shape[:-1], padded.shape[-1] // size, size)


def _e2m1(blocks: Tensor, scale: Tensor) -> Tensor:
    """The nearest of e2m1 times the scale; of two that are as near, the even one."""
    size = (blocks.abs() * torch.where(scale > 0, 1 / scale, 0.0)).clamp_max(6.0)
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return ((size / step).round() * step * scale).copysign(blocks)


@cache
def rounding(kind: str | Inputs) -> Rounding | None:
    """What a runtime does to the activations that meet weights of a type of ggml, or of a folder that says
    it; None when nothing."""
    if isinstance(kind, Inputs):
        return _as_told(kind)
    if kind == "F32":
        return None
    if kind in _NARROW:
        return lambda inputs: inputs.to(_NARROW[kind]).float()
    return by_32 if kind in _BY_32 else by_256


def _as_told(told: Inputs) -> Rounding | None:
    match told.numbers:
        case "":
            return None
        case "NVFP4":
            assert told.number is not None
            return partial(nvfp4, divisor=told.number)
        case "MXFP4":
            return mxfp4
        case _ if told.group < 0:
            assert told.number is not None
            return partial(fixed, scale=told.number)
    return partial(dynamic, told=told)


class Rounded:
    """The roundings of one file by the name of the module, or side of the experts, that they come before."""

    def __init__(self, checkpoint: Checkpoint, types: Mapping[str, str] | Mapping[str, Inputs]) -> None:
        found: dict[str, set[Rounding | None]] = {}
        names: dict[str, str] = {}
        for weight in checkpoint.weights:
            if weight.site is None or not weight.runs:
                continue  # norms, routers and look-ups are exact
            place = weight.site.name if weight.is_expert else weight.place.param.removesuffix(".weight")
            if weight.role is Role.EMBEDDING:
                place = "lm_head"
            found.setdefault(place, set()).add(rounding(types[weight.name]))
            names[place] = weight.name
        self.by_place: dict[str, Rounding] = {}
        for place, kinds in found.items():
            if len(kinds) > 1:
                raise VerifyError(
                    f"{names[place]}: shares its input with a weight for which the runtime rounds it in "
                    "another way; compare with --exact"
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
    running = (weight for weight in checkpoint.weights if weight.runs)
    for place in sorted({weight.place.param.removesuffix(".weight") for weight in running}):
        owner, _, last = place.rpartition(".")  # of fused experts the last part is a parameter
        module = getattr(model.get_submodule(owner), last, None)
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(_hook(place))
    if checkpoint.tied:
        model.get_submodule("lm_head").register_forward_pre_hook(_hook("lm_head"))


def _hook(place: str) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...] | None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        wanted = current()
        return None if wanted is None else (wanted(place, args[0]), *args[1:])

    return hook
