"""Hostile quantized checkpoints: damaged parts of weights in every codec, and configs that lie about them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.hostile import damage
from tests.hostile.attempts import Attempt, on_model
from tests.hostile.ground import Ground

Parts = dict[str, Tensor]


def _bytes(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(0, 120, shape, dtype=torch.uint8, generator=generator)


def _words(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)


def _scales(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=generator) * 0.01 + 0.001


def _fp8_blocks(g: torch.Generator, n: int, k: int) -> Parts:
    return {
        "weight": _bytes(g, n, k).view(torch.float8_e4m3fn),
        "weight_scale_inv": _scales(g, -(-n // 32), -(-k // 32)),
    }


def _fp8(g: torch.Generator, n: int, k: int) -> Parts:
    return {
        "weight": _bytes(g, n, k).view(torch.float8_e4m3fn),
        "weight_scale": _scales(g, n, 1).bfloat16(),
    }


def _int8(g: torch.Generator, n: int, k: int) -> Parts:
    return {"weight": _bytes(g, n, k).view(torch.int8), "weight_scale": _scales(g, n, 1).bfloat16()}


def _packed(g: torch.Generator, n: int, k: int) -> Parts:
    return {
        "weight_packed": _words(g, n, k // 8),
        "weight_scale": _scales(g, n, k // 32).bfloat16(),
        "weight_shape": torch.tensor([n, k]),
    }


def _asymmetric(g: torch.Generator, n: int, k: int) -> Parts:
    return _packed(g, n, k) | {"weight_zero_point": _words(g, n // 8, k // 32)}


def _nvfp4(g: torch.Generator, n: int, k: int) -> Parts:
    return {
        "weight_packed": _bytes(g, n, k // 2),
        "weight_scale": _bytes(g, n, k // 16).view(torch.float8_e4m3fn),
        "weight_global_scale": torch.tensor([100.0]),
    }


def _gptq(g: torch.Generator, n: int, k: int) -> Parts:
    return {
        "qweight": _words(g, k // 8, n),
        "qzeros": _words(g, k // 32, n // 8),
        "scales": _scales(g, k // 32, n).half(),
        "g_idx": (torch.arange(k) // 32).to(torch.int32),
    }


def _awq(g: torch.Generator, n: int, k: int) -> Parts:
    return {
        "qweight": _words(g, k, n // 8),
        "qzeros": _words(g, k // 32, n // 8),
        "scales": _scales(g, k // 32, n).half(),
    }


def _groups(form: str, **weights: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
    }


CODECS: dict[str, tuple[Callable[[torch.Generator, int, int], Parts], dict[str, Any]]] = {
    "fp8": (_fp8_blocks, {"quant_method": "fp8", "weight_block_size": [32, 32]}),
    "float": (_fp8, _groups("float-quantized", num_bits=8, type="float", strategy="channel")),
    "int8": (_int8, _groups("int-quantized", num_bits=8, type="int", strategy="channel")),
    "int4": (_packed, _groups("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32)),
    "asymmetric": (_asymmetric, _groups("pack-quantized", num_bits=4, type="int", strategy="group",
                                        group_size=32, symmetric=False)),
    "nvfp4": (_nvfp4, _groups("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group",
                              group_size=16)),
    "gptq": (_gptq, {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}),
    "awq": (_awq, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}),
}  # fmt: skip
"""Parts of a weight [n, k], and the config that goes with them."""

MODULES = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.mlp.experts.1.up_proj",
    "model.layers.0.mlp.experts.3.down_proj",
)

ENDLESS = (
    "re:(a+)+$",
    "re:(.*)*x",
    "re:((model|layers|.)*)*y",
    "re:.*.*.*.*.*.*.*.*.*.*z",
    "re:(",
    "*",
    "re:",
)
"""Patterns that a matcher may not come back from, or cannot read."""


def quantized(random: Random, ground: Ground, folder: Path) -> Attempt:
    """Some weights of a model in one of the codecs; parts, values or config are not as they should be."""
    model = ground.copy("qwen3_moe", folder / "model")
    name = random.choice(sorted(CODECS))
    make, config = CODECS[name]
    config = json.loads(json.dumps(config))
    path = model / "model.safetensors"
    tensors, generator = load_file(path), torch.Generator().manual_seed(random.randrange(1000))
    parts: Parts = {}
    for module in MODULES:
        n, k = tensors.pop(f"{module}.weight").shape
        parts |= {f"{module}.{part}": each for part, each in make(generator, n, k).items()}
    what, must = _damage(random, parts, config)
    save_file({name: each.contiguous().clone() for name, each in (tensors | parts).items()}, path)
    raw = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(raw | {"quantization_config": config}))
    return on_model(random, model, f"{name}: {what}", must)


def _damage(random: Random, parts: Parts, config: dict[str, Any]) -> tuple[str, bool]:
    """What was done, and whether nobody may believe it."""
    part = random.choice(sorted(parts))
    draw = random.random()
    if draw < 0.35:
        scales = [name for name in sorted(parts) if "scale" in name]
        part, value = random.choice(scales), float(random.choice(["nan", "inf", "-inf", "-1", "0", "1e30"]))
        changed = parts[part].float()
        changed.view(-1)[random.randrange(changed.numel())] = value
        parts[part] = changed.to(parts[part].dtype)
        return f"{part} has {value}", not bool(torch.isfinite(parts[part].float()).all())
    if draw < 0.6:
        old = parts[part]
        parts[part] = random.choice(
            [
                lambda: old[:-1],
                lambda: old[:0],
                lambda: old.reshape(-1),
                lambda: old[None],
                lambda: old.t() if old.dim() == 2 else old[:1],
                lambda: torch.cat([old, old]),
                lambda: old.view(torch.uint8) if old.dim() else old,
                lambda: torch.full_like(old.float(), -3).to(old.dtype),
                lambda: torch.full((*old.shape,), 2**30, dtype=torch.int64),
            ]
        )()
        return f"{part} is {parts[part].dtype} {list(parts[part].shape)}", False
    if draw < 0.7:
        del parts[part]
        return f"{part} is gone", False
    return _lie(random, config), False


def _lie(random: Random, config: dict[str, Any]) -> str:
    """Changes a config so that it says something else than the tensors."""
    if random.random() < 0.2:
        key = random.choice(["ignore", "modules_to_not_convert"])
        config[key] = [random.choice(ENDLESS)]
        if random.random() < 0.5 and "config_groups" in config:
            config["config_groups"]["group_0"]["targets"] = [random.choice(ENDLESS)]
        return f"{key} is {config[key]}"
    key = random.choice(["bits", "group_size", "weight_block_size", "config_groups", "ignore", "dynamic",
                         "extra_config", "sparsity_config", "transform_config", "quant_method",
                         "quantization", "modules_to_not_convert", "quantized_layers", "quant_algo",
                         "packing_format", "checkpoint_format", "desc_act", "sym", "zero_point"])  # fmt: skip
    if random.random() < 0.5 and key in config:
        changed = damage.change(random, config, random.randrange(1, 3), (key,))
    elif random.random() < 0.6:
        changed = {**config, key: damage.odd(random, config.get(key))}
    else:
        changed = damage.change(random, config, random.randrange(1, 3))
    config.clear()
    config.update(changed)
    return f"config {str(changed)[:200]}"
