"""A transformers model, empty at first, filled from a checkpoint's weights as they are needed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from moequant.checkpoint import Checkpoint, load, uninterleave
from moequant.errors import CheckpointError
from moequant.values import Weight

Provider = Callable[[Weight], Tensor]
"""A weight's values, shape `weight.shape`, rows in the order of the output file."""


def build_model(
    checkpoint: Checkpoint, experts: str, provider: Provider = load, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """The checkpoint's whole model in evaluation mode with weights from `provider`.

    `experts` names the registered experts implementation that runs the MoE blocks, see
    `routing.experts`. Raises CheckpointError when transformers expects another shape.
    """
    model = empty_model(checkpoint, experts)
    fill(model, checkpoint.weights, provider, dtype)
    if checkpoint.tied:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    return model


def empty_model(checkpoint: Checkpoint, experts: str, device: str | torch.device = "cpu") -> PreTrainedModel:
    """The model without memory for its weights: parameters are on the meta device, buffers on `device`.

    Raises CheckpointError when a parameter would be filled by nothing in the checkpoint.
    """
    config = AutoConfig.for_model(**_config_kwargs(checkpoint))
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="sdpa", experts_implementation=experts
        )
    # Buffers are computed from the config by transformers' own initialisation, which meta tensors skipped.
    for module in model.modules():
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            for name, buffer in list(module.named_buffers(recurse=False)):
                module.register_buffer(name, torch.empty_like(buffer, device=device), persistent=False)
            model._init_weights(module)
    _check_filled(checkpoint, model)
    made: PreTrainedModel = model.eval().requires_grad_(False)
    return made


def fill(
    model: nn.Module,
    weights: Iterable[Weight],
    provider: Provider = load,
    dtype: torch.dtype | None = torch.float32,
    device: str | torch.device = "cpu",
) -> None:
    """Give the parameters of `weights` memory on `device` and their values.

    `dtype` None keeps experts as they are stored (the experts function widens one at a
    time) and everything else in float32. Raises CheckpointError for a shape that the
    model does not have.
    """
    for weight in weights:
        parameter = model.get_parameter(weight.param)
        start, stop = weight.param_rows
        expected = (*parameter.shape[:-2], stop - start, *parameter.shape[-1:]) if weight.shape[1:] else None
        if (expected or tuple(parameter.shape)) != weight.shape:
            raise CheckpointError(
                f"{weight.name}: shape {list(weight.shape)} does not fit config.json, "
                f"which asks for {list(expected or parameter.shape)}"
            )
        values = provider(weight)
        wanted = dtype or (values.dtype if weight.role.is_expert else torch.float32)
        if parameter.is_meta:
            parameter = _assign(model, weight.param, torch.empty_like(parameter, dtype=wanted, device=device))
        target = parameter.data[..., start:stop, :] if weight.shape[1:] else parameter.data
        target.copy_(uninterleave(values, weight.rope_heads) if weight.rope_heads else values)


def release(model: nn.Module, weights: Iterable[Weight]) -> None:
    """Take the memory of these weights' parameters back."""
    for name in {weight.param for weight in weights}:
        parameter = model.get_parameter(name)
        _assign(model, name, torch.empty_like(parameter, device="meta"))


def _assign(model: nn.Module, name: str, values: Tensor) -> nn.Parameter:
    module, _, leaf = name.rpartition(".")
    parameter = nn.Parameter(values, requires_grad=False)
    setattr(model.get_submodule(module), leaf, parameter)
    return parameter


def _config_kwargs(checkpoint: Checkpoint) -> dict[str, Any]:
    """The config as the folder has it: transformers resolves its own aliases."""
    config: dict[str, Any] = json.loads((checkpoint.path / "config.json").read_text(encoding="utf-8"))
    config.pop("auto_map", None)
    config["tie_word_embeddings"] = checkpoint.tied
    return config


def _check_filled(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Every parameter will have its values, every weight its parameter."""
    there = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    filled = {weight.param for weight in checkpoint.weights}
    if unknown := sorted(filled - there):
        raise CheckpointError(f"{unknown[0]}: transformers' {type(model).__name__} has no such parameter")
    if checkpoint.tied:
        there.discard("lm_head.weight")
    if empty := sorted(there - filled):
        raise CheckpointError(
            f"{type(model).__name__}: nothing in the checkpoint fills {', '.join(empty[:3])}"
        )
