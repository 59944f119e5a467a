"""The search for scales and minima in C beside the same by torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moequant.formats.affine import (
    Affine,
    AffineFit,
    search,
    search_block,
    search_block_by_torch,
    search_by_torch,
)
from moequant.formats.base import Effort
from tests.formats.checks import as_good, odd_blocks

SUPER = {
    "Q2_K": Affine(sub=16, top=3, top_scale=15, steps=17),
    "Q4_K": Affine(sub=32, top=15, top_scale=63),
    "Q5_K": Affine(sub=32, top=31, top_scale=63),
}


def value(grid: Affine, fit: AffineFit) -> Tensor:
    """The weights, f64 [n, block]."""
    codes = fit.codes.double().view(len(fit.codes), -1, grid.sub)
    scale, minimum = (
        each.double()[:, :, None] if grid.top_scale else torch.ones(()) for each in (fit.scale, fit.minimum)
    )
    d, dmin = (each.double()[:, None, None] for each in (fit.d, fit.dmin))
    return (d * scale * codes - dmin * minimum).flatten(1)


@pytest.mark.parametrize("effort", ["fast", "default", "best"])
@pytest.mark.parametrize("name", SUPER)
def test_super_blocks(name: str, effort: Effort) -> None:
    grid = SUPER[name]
    x, w = odd_blocks(256)
    found, known = (value(grid, one(grid, x, w, effort)) for one in (search, search_by_torch))
    as_good(found, known, x, w)


@pytest.mark.parametrize("effort", ["fast", "default", "best"])
@pytest.mark.parametrize("top", [15, 31])
def test_blocks(top: int, effort: Effort) -> None:
    grid = Affine(sub=32, top=top)
    x, w = odd_blocks(32)
    found, known = (value(grid, one(grid, x, w, effort)) for one in (search_block, search_block_by_torch))
    as_good(found, known, x, w)


def test_blocks_do_not_depend_on_each_other() -> None:
    grid = SUPER["Q4_K"]
    x, w = odd_blocks(256)
    whole = search(grid, x, w, "default")
    for rows in (slice(0, 1), slice(3, 12), slice(40, 57)):
        part = search(grid, x[rows], w[rows], "default")
        assert torch.equal(part.codes, whole.codes[rows]) and torch.equal(part.d, whole.d[rows])
        assert torch.equal(part.scale, whole.scale[rows]) and torch.equal(part.minimum, whole.minimum[rows])
