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
