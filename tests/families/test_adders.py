"""What a family says that is added to the residual stream as it is: the model is asked.

Rounding corrects the stream's error through such weights (`adds`). Where a norm, a multiplier or another
product stands behind, it must not.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moequant.checkpoint import open_checkpoint
from moequant.forward.model import build_model
from moequant.values import Role, Weight
from tests import models

LAST = (Role.ATTN_OUT, Role.SSM_OUT, Role.DENSE_DOWN, Role.SHARED_DOWN, Role.DOWN, Role.LATENT_UP)
"""What a block of a layer ends with."""

IN_A_ROW = (Role.DOWN, Role.LATENT_UP)
"""The one is fed what the other gives."""

BESIDE = {"cohere2_moe": (Role.DENSE_DOWN, Role.DOWN)}
"""Blocks that are added beside another, which alone corrects the error: both would do it twice. So it is with
all shared experts."""


def added(model: torch.nn.Module, layers: str, kind: list[Weight], others: list[Weight]) -> list[bool]:
    """Whether each layer that has a weight of this kind gives its input and what the weight's module gives,
    once all other blocks give nothing."""
    seen: dict[str, torch.Tensor] = {}

    def note(name: str) -> Any:
        def hook(module: torch.nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            seen[f"{name} in"] = args[0] if args else kwargs["hidden_states"]
            seen[f"{name} out"] = out[0] if isinstance(out, tuple) else out

        return hook

    at = {each.place.param.rpartition(".")[0]: f"{layers}.{each.layer}" for each in kind}
    hooks = [
        model.get_submodule(name).register_forward_hook(note(name), with_kwargs=True)
        for name in {*at, *at.values()}
    ]
    before = {each.place.param: value(model, each).clone() for each in others}
    for each in others:
        value(model, each).zero_()
    ids = torch.randint(1, models.VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        model(input_ids=ids, use_cache=False)
    for each in others:
        value(model, each).copy_(before[each.place.param])
    for hook in hooks:
        hook.remove()
    return [
        is_sum(seen[f"{layer} out"], seen[f"{layer} in"], seen[f"{module} out"])
        for module, layer in at.items()
    ]


def is_sum(total: torch.Tensor, stream: torch.Tensor, given: torch.Tensor) -> bool:
    """Whether the total is both together."""
    assert given.abs().max() > 1e-3, "a block that gives nothing tells nothing"
    if given.numel() != stream.numel() or total.shape != stream.shape:
        return False
    return torch.allclose(total - stream, given.reshape(stream.shape), rtol=1e-3, atol=1e-5)


def value(model: torch.nn.Module, weight: Weight) -> torch.Tensor:
    """What the model holds of a weight."""
    module, _, leaf = weight.place.param.rpartition(".")
    return getattr(model.get_submodule(module), leaf).data


@pytest.mark.parametrize("family", models.CONFIGS)
def test_what_adds_to_the_stream_is_what_the_family_says(tiny, family: str) -> None:
    checkpoint = open_checkpoint(tiny(family))
    model = build_model(checkpoint)
    ends = [each for each in checkpoint.weights if each.role in LAST and each.layer is not None]
    biases = {each.name: each for each in checkpoint.weights if each.role is Role.BIAS}
    for role in {each.role for each in ends}:
        kind = [each for each in ends if each.role is role]
        chain = IN_A_ROW if role in IN_A_ROW else (role,)
        others = [each for each in ends if each.role not in chain]
        others += [biases[name] for each in others if (name := f"{each.name}.bias") in biases]
        found = added(model, checkpoint.family.layers_at, kind, others)
        if role is Role.SHARED_DOWN or role in BESIDE.get(family, ()):
            assert not any(each.adds for each in kind), role
        else:
            assert found == [each.adds for each in kind], role
