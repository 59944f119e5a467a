"""The search for scales in C beside the same by torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moequant.formats.base import Effort
from moequant.formats.symmetric import (
    Symmetric,
    SymmetricFit,
    land_block,
    search,
    search_block,
    search_block_by_torch,
    search_by_torch,
)
from tests.formats.checks import as_good, odd_blocks

SUPER = {
    "Q3_K": Symmetric(sub=16, low=-4, high=3, low_scale=-32, high_scale=31),
    "Q6_K": Symmetric(sub=16, low=-32, high=31, low_scale=-128, high_scale=127),
}


def value(grid: Symmetric, fit: SymmetricFit) -> Tensor:
    """The weights, f64 [n, block]."""
    codes = fit.codes.double().view(len(fit.codes), -1, grid.sub)
    scale = fit.scale.double()[:, :, None] if grid.low_scale else torch.ones(())
    return (fit.d.double()[:, None, None] * scale * codes).flatten(1)


@pytest.mark.parametrize("effort", ["fast", "default", "best"])
@pytest.mark.parametrize("name", SUPER)
def test_super_blocks(name: str, effort: Effort) -> None:
    grid = SUPER[name]
    x, w = odd_blocks(256)
    found, known = (value(grid, one(grid, x, w, effort)) for one in (search, search_by_torch))
    as_good(found, known, x, w)


@pytest.mark.parametrize("effort", ["fast", "default", "best"])
@pytest.mark.parametrize("low", [-8, -16])
def test_blocks(low: int, effort: Effort) -> None:
    grid = Symmetric(sub=32, low=low, high=-low - 1)
    x, w = odd_blocks(32)
    found, known = (value(grid, one(grid, x, w, effort)) for one in (search_block, search_block_by_torch))
    as_good(found, known, x, w)


def test_eight_bits() -> None:
    grid = Symmetric(sub=32, low=-127, high=127)
    x, w = odd_blocks(32)
    few, many = (value(grid, land_block(grid, x, w, places)) for places in ((127.0,), (127.0, 125.0, 122.0)))
    largest = x.abs().amax(1, keepdim=True).double()
    for found in (few, many):
        assert bool(((found - x).abs() <= 0.63 / 127 * largest + 2.0**-24).all())
    lost = [float(((found - x).square() * w).sum(1)[20:].sum()) for found in (few, many)]
    assert 0.7 * lost[0] < lost[1] < lost[0]


def test_blocks_do_not_depend_on_each_other() -> None:
    grid = SUPER["Q6_K"]
    x, w = odd_blocks(256)
    whole = search(grid, x, w, "default")
    for rows in (slice(0, 1), slice(3, 12), slice(40, 57)):
        part = search(grid, x[rows], w[rows], "default")
        assert torch.equal(part.codes, whole.codes[rows]) and torch.equal(part.d, whole.d[rows])
        assert torch.equal(part.scale, whole.scale[rows])
