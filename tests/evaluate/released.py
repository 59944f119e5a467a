"""Quantized releases in the formats of other tools, made of a tiny checkpoint by plain arithmetic."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)

_LINEAR = re.compile(r"layers\.\d+\..*(_proj|\.w[123])\.weight")


def number(name: str) -> float:
    """A number that scales inputs, another one for every module; some inputs are beyond its reach."""
    return 0.004 + 0.0001 * (sum(map(ord, name)) % 17)


def blocks(name: str, weight: Tensor) -> dict[str, Tensor]:
    """DeepSeek's: an f32 scale for 128 x 128."""
    squares = [part.split(128, 1) for part in weight.float().split(128)]
    scale = torch.stack([torch.stack([square.abs().max() for square in row]) for row in squares]) / 448
    spread = scale.repeat_interleave(128, 0)[: len(weight)].repeat_interleave(128, 1)[:, : weight.shape[1]]
    return {"weight": (weight.float() / spread).to(torch.float8_e4m3fn), "weight_scale_inv": scale}


def whole(ending: str, weights: str = "weight_scale") -> Callable[[str, Tensor], dict[str, Tensor]]:
    """One scale for the weight, and one for its inputs."""

    def made(name: str, weight: Tensor) -> dict[str, Tensor]:
        scale = weight.float().abs().max() / 448
        codes = (weight.float() / scale).to(torch.float8_e4m3fn)
        return {"weight": codes, weights: scale, ending: torch.tensor(number(name))}

    return made


def channels(name: str, weight: Tensor) -> dict[str, Tensor]:
    """A scale for every row."""
    scale = weight.float().abs().amax(1, keepdim=True) / 448
    return {"weight": (weight.float() / scale).to(torch.float8_e4m3fn), "weight_scale": scale[:, 0]}


def mx(name: str, weight: Tensor) -> dict[str, Tensor]:
    """MXFP8: a power of two for 32 weights."""
    groups = weight.float().unflatten(1, (-1, 32))
    power = (groups.abs().amax(-1, keepdim=True) / 448).log2().ceil()
    codes = (groups / power.exp2()).flatten(1).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": (power[..., 0] + 127).to(torch.uint8)}


def nvfp4(name: str, weight: Tensor) -> dict[str, Tensor]:
    """ModelOpt's NVFP4; the number of inputs is what the largest divided by 6 * 448 is."""
    groups = weight.double().unflatten(1, (-1, 16))
    two = weight.double().abs().max() / 2688
    scale = (groups.abs().amax(-1, keepdim=True) / 6 / two).to(torch.float8_e4m3fn)
    size = groups.abs() / (scale.double() * two).clamp_min(1e-30)
    codes = (size[..., None] - E2M1).abs().argmin(-1) | (groups < 0).long() << 3
    codes = codes.flatten(1).to(torch.uint8)
    return {
        "weight": codes[:, ::2] | codes[:, 1::2] << 4,
        "weight_scale": scale[..., 0],
        "weight_scale_2": two.float(),
        "input_scale": torch.tensor(number(name) / 6),
    }


def _codes(weight: Tensor, bits: int, group: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Codes from 0 [out, in], scales f16 and zero points [out, groups]."""
    groups, top = weight.float().unflatten(1, (-1, group)), 2**bits - 1
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    scale = ((high - low) / top).half()
    zero = torch.full_like(scale, 2 ** (bits - 1)) if symmetric else (-low / scale).round().clamp(0, top)
    codes = (groups / scale[..., None].float() + zero[..., None]).round().clamp(0, top)
    return codes.flatten(1).long(), scale, zero.long()


def _words(codes: Tensor, bits: int) -> Tensor:
    """Codes [n, m] -> i32 [n · bits / 32, m], lowest bits first, by a stream of bits."""
    stream = (codes[:, None] >> torch.arange(bits)[:, None] & 1).flatten(0, 1).unflatten(0, (-1, 32))
    words = (stream << torch.arange(32)[:, None]).sum(1)
    return (words - (words >> 31 << 32)).to(torch.int32)


def gptq(
    bits: int, group: int, symmetric: bool = True, version: int = 1, act_order: bool = False
) -> Callable[[str, Tensor], dict[str, Tensor]]:
    """GPTQ's, both versions; with `act_order` columns are in the groups that `g_idx` names."""

    def made(name: str, weight: Tensor) -> dict[str, Tensor]:
        n_in = weight.shape[1]
        order = torch.randperm(n_in, generator=torch.Generator().manual_seed(3))
        order = order if act_order else torch.arange(n_in)
        codes, scale, zero = _codes(weight[:, order], bits, group, symmetric)
        back = torch.empty_like(order)
        back[order] = torch.arange(n_in)
        stored = zero if version == 2 else (zero - 1) % 2**bits
        return {
            "qweight": _words(codes[:, back].T, bits),
            "qzeros": _words(stored, bits).T,
            "scales": scale.T,
            "g_idx": (back // group).to(torch.int32),
        }

    return made


def _eights(codes: Tensor, order: tuple[int, ...]) -> Tensor:
    """Codes [out, n] -> i32 [n, out / 8]: nibble i of a word is the output `order[i]` of its eight."""
    words = ((codes & 15).T.unflatten(1, (-1, 8))[..., order] << 4 * torch.arange(8)).sum(-1)
    return (words - (words >> 31 << 32)).to(torch.int32)


GEMM = (0, 2, 4, 6, 1, 3, 5, 7)


def awq(name: str, weight: Tensor) -> dict[str, Tensor]:
    """AutoAWQ's in gemm order, groups of 64."""
    codes, scale, zero = _codes(weight, 4, 64, False)
    return {"qweight": _eights(codes, GEMM), "qzeros": _eights(zero, GEMM), "scales": scale.T}


def quark_int(
    signed: bool, symmetric: bool, order: tuple[int, ...]
) -> Callable[[str, Tensor], dict[str, Tensor]]:
    """Quark's integers of 4 bits, groups of 64: with a sign as two's complement, without zero points where
    they are symmetric."""

    def made(name: str, weight: Tensor) -> dict[str, Tensor]:
        codes, scale, zero = _codes(weight, 4, 64, symmetric)
        less = 8 if signed else 0
        parts = {"weight": _eights(codes - less, order), "weight_scale": scale.T}
        return parts if symmetric else parts | {"weight_zero_point": _eights(zero - less, order)}

    return made


def fp6(name: str, weight: Tensor) -> dict[str, Tensor]:
    """Quark's FP6 with three bits of exponent: four codes in three bytes, a power of two for 32 weights."""
    numbers = torch.tensor(
        [m / 16 for m in range(4)] + [(1 + m / 4) * 2.0**e for e in range(-2, 5) for m in range(4)]
    )
    groups = weight.float().unflatten(1, (-1, 32))
    power = (groups.abs().amax(-1, keepdim=True) / 28).log2().ceil()
    sizes = (groups.abs() / power.exp2()).contiguous()
    codes = (sizes[..., None] - numbers).abs().argmin(-1) | (groups < 0).long() << 5
    four = (codes.flatten(1).unflatten(1, (-1, 4)) << torch.arange(0, 24, 6)).sum(-1)
    codes = (four[..., None] >> torch.arange(0, 24, 8) & 255).flatten(1)
    return {"weight": codes.to(torch.uint8), "weight_scale": (power[..., 0] + 127).to(torch.uint8)}


def packed(name: str, weight: Tensor) -> dict[str, Tensor]:
    """compressed-tensors' integers of 4 bits with zero points, as llm-compressor's `W4A16_ASYM` has them."""
    codes, scale, zero = _codes(weight, 4, 64, False)
    return {
        "weight_packed": _words(codes.T, 4).T,
        "weight_scale": scale,
        "weight_zero_point": _words(zero, 4),
        "weight_shape": torch.tensor(weight.shape),
    }


def release(
    model: Path, out: Path, form: Callable[[str, Tensor], dict[str, Tensor]], config: dict[str, Any]
) -> dict[str, Tensor]:
    """A copy of `model` with every linear of its layers in that form; returns what it stores."""
    out.mkdir(parents=True)
    for file in model.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, out)
    stored: dict[str, Tensor] = {}
    for name, weight in load_file(model / "model.safetensors").items():
        if not _LINEAR.search(name):
            stored[name] = weight
            continue
        module = name.removesuffix(".weight")
        stored |= {f"{module}.{key}": value.contiguous() for key, value in form(module, weight).items()}
    save_file(stored, out / "model.safetensors", {"format": "pt"})
    raw = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(raw | {"quantization_config": config}))
    return stored
