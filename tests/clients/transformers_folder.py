"""A quantized folder as transformers loads it: `from_pretrained`, compressed-tensors decoding the weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM


def load(folder: Path) -> nn.Module:
    """The model in evaluation mode, experts decoded to dense; every weight came from the folder.

    It is loaded in the folder's own precision and computes in float32. Asked for float32 at once,
    transformers 5.23 leaves experts in the precision of their scales and rounds activations to it.
    """
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", experts_implementation="eager", output_loading_info=True
    )
    wrong = {key: value for key, value in report.items() if value}
    assert not wrong, wrong
    with torch.no_grad():
        model(torch.tensor([[0]]))  # dense linears are decoded when they are first used
    return nn.Module.float(model.eval())  # transformers' own refuses, because the weights came quantized


def log_probabilities(model: nn.Module, prompts: list[list[int]]) -> list[Tensor]:
    """Of every token of each prompt but the first: f32 [tokens - 1]."""
    found = []
    with torch.inference_mode():
        for ids in prompts:
            row = torch.tensor([ids])
            scores = torch.log_softmax(model(row).logits[0, :-1].float(), -1)
            found.append(scores.gather(1, row[0, 1:, None])[:, 0])
    return found
