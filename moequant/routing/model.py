"""A transformers model filled from a checkpoint's weights, in the layout transformers computes with."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from moequant.checkpoint import Checkpoint, load, uninterleave
from moequant.errors import CheckpointError
from moequant.values import Weight

Provider = Callable[[Weight], Tensor]
"""A weight's values, shape `weight.shape`, rows in the order of the output file."""


def build_model(
    checkpoint: Checkpoint, experts: str, provider: Provider = load, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """The checkpoint's model in evaluation mode with weights from `provider`.

    `experts` names the registered experts implementation that runs the MoE blocks, see
    `routing.experts`. Raises CheckpointError when transformers expects another shape.
    """
    config = AutoConfig.for_model(**_config_kwargs(checkpoint))
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="sdpa", experts_implementation=experts
        )
    params = dict(model.named_parameters(remove_duplicate=False))
    filled: set[str] = set()
    with torch.no_grad():
        for weight in checkpoint.weights:
            if weight.param not in params:
                raise CheckpointError(
                    f"{weight.param}: transformers' {type(model).__name__} has no such parameter"
                )
            target = params[weight.param]
            start, stop = weight.param_rows
            if len(weight.shape) > 1:
                target = target[..., start:stop, :]
            if tuple(target.shape) != weight.shape:
                raise CheckpointError(
                    f"{weight.name}: shape {list(weight.shape)} does not fit config.json, "
                    f"which asks for {list(target.shape)}"
                )
            values = provider(weight)
            target.copy_(uninterleave(values, weight.rope_heads) if weight.rope_heads else values)
            filled.add(weight.param)
    _check_filled(model, params, filled, checkpoint.tied)
    made: nn.Module = model.eval()
    return made


def _config_kwargs(checkpoint: Checkpoint) -> dict[str, Any]:
    """The config as the folder has it: transformers resolves its own aliases."""
    config: dict[str, Any] = json.loads((checkpoint.path / "config.json").read_text(encoding="utf-8"))
    config.pop("auto_map", None)
    config["tie_word_embeddings"] = checkpoint.tied
    return config


def _check_filled(model: nn.Module, params: dict[str, nn.Parameter], filled: set[str], tied: bool) -> None:
    """Every parameter has its values: nothing runs on uninitialised memory."""
    shared = {"lm_head.weight"} if tied else set()
    if empty := sorted(params.keys() - filled - shared):
        raise CheckpointError(
            f"{type(model).__name__}: nothing in the checkpoint fills {', '.join(empty[:3])}"
        )
