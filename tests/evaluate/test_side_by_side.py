"""Two versions of a model side by side: what differs is named, parameters and buffers alike."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch import Tensor

from moequant.checkpoint import load, open_checkpoint
from moequant.evaluate.side_by_side import Version, compare
from moequant.values import Weight
from tests.forward.test_stream import SMALL, rows


@pytest.mark.parametrize("ram", [None, 0])
@pytest.mark.parametrize("family", ["deepseek_v3", "gemma4", "gpt_oss", "mixtral"])
def test_the_error_of_every_weight_is_its_own(tiny, family: str, ram: int | None) -> None:
    """Also of buffers: a router's correction, a scalar of the layer itself. Layers are wholes, or their
    experts come one by one."""
    checkpoint = open_checkpoint(tiny(family))
    expected = {each.name: 0.01 * (1 + at % 7) for at, each in enumerate(checkpoint.weights)}

    def changed(weight: Weight) -> Tensor:
        return load(weight).float() * (1 + expected[weight.name])

    base = Version("base", lambda weight: load(weight).float())
    (found,) = compare(checkpoint, base, [Version("a", changed)], rows(), replace(SMALL, ram=ram))
    errors = {each.weight: each.error for each in found.errors}
    assert errors.keys() == expected.keys()
    for name, error in errors.items():
        assert error.tolist() == pytest.approx([expected[name] ** 2] * len(error), rel=1e-3), name
