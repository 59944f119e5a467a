"""Models whose first router starves experts on purpose."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests import models

GATE = "model.layers.{}.mlp.gate.weight"


def never_chosen(folder: Path, dead: int, layers: int = 2) -> Path:
    """A Qwen3-MoE of 8 experts, top 2, whose last `dead` experts no token can reach.

    Experts 0 to 3 have rows v, -v, w and -w: of each pair one logit is above 0, and the
    rows of the dead are 0.
    """
    models.build(folder, "qwen3_moe", num_hidden_layers=layers)
    return rewrite(folder, {GATE.format(layer): _pairs(layer, dead) for layer in range(layers)})


def _pairs(layer: int, dead: int) -> Tensor:
    rows = torch.randn(8, 256, generator=torch.Generator().manual_seed(layer))
    rows[1], rows[3] = -rows[0], -rows[2]
    rows[8 - dead :] = 0
    return rows


def counted(folder: Path, ids: Tensor, counts: list[int]) -> Path:
    """A Qwen3-MoE whose first router sends `counts[e]` of the tokens `ids` to expert e, the rest elsewhere.

    Fewer tokens than the model is wide: then a router with any wanted logits exists, and
    least squares finds it. Experts beyond `counts` are never starved.
    """
    models.build(folder, "qwen3_moe", num_hidden_layers=1, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    seen: list[Tensor] = []
    model.model.layers[0].mlp.gate.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.inference_mode():
        model(ids)
    hidden = torch.cat([part.reshape(-1, 256) for part in seen]).clone()
    logits = torch.full((len(hidden), 8), -8.0)
    fed = torch.arange(len(counts), 8)
    for token in range(len(hidden)):
        logits[token, fed[token % len(fed)]] = 4.0
        logits[token, fed[(token + 1) % len(fed)]] = 3.0
    start = 0
    for expert, count in enumerate(counts):
        logits[start : start + count, expert] = 8.0
        start += count
    router = torch.linalg.lstsq(hidden.double(), logits.double(), driver="gelsd").solution.T
    return rewrite(folder, {GATE.format(0): router.float()})


def rewrite(folder: Path, tensors: dict[str, Tensor]) -> Path:
    """Put other values into a saved model."""
    file = folder / "model.safetensors"
    stored = load_file(file)
    for name, values in tensors.items():
        assert stored[name].shape == values.shape, json.dumps([name, list(values.shape)])
        stored[name] = values.to(stored[name].dtype).contiguous()
    save_file(stored, file, {"format": "pt"})
    return folder
