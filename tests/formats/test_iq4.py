"""IQ4_NL and IQ4_XS against ggml and gguf-py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moequant.formats.base import Effort, Format
from moequant.formats.codebook import inverse, nearest
from moequant.formats.iq4 import CODES, IQ4_NL, IQ4_XS, MIDS, VALUES, codes, fit
from tests.formats.checks import (
    casualties,
    decodes_like_others,
    importances,
    loss,
    objective,
    random_bytes,
    ratio_to_ggml,
    weights,
)

FORMATS = pytest.mark.parametrize("fmt", [IQ4_NL, IQ4_XS], ids=lambda f: f.name)


@FORMATS
def test_decoder_is_ggml_bit_for_bit(fmt: Format) -> None:
    assert decodes_like_others(fmt, random_bytes(fmt))
    x = weights("heavy").reshape(-1, fmt.block)
    assert decodes_like_others(fmt, fmt.encode(x, x.abs() + 0.01, "fast"))


# The optimum over every scale is 0.953 for IQ4_NL on Gaussian weights and mild importance: block by block,
# nothing below it exists.
@FORMATS
@pytest.mark.parametrize(
    ("kind", "importance", "limit"),
    [("gauss", "mild", 0.96), ("heavy", "mild", 0.98), ("gauss", "spiky", 0.93), ("heavy", "flat", 0.985)],
)
def test_error_is_below_ggml(fmt: Format, kind: str, importance: str, limit: float) -> None:
    assert ratio_to_ggml(fmt, kind, importance) <= limit


@FORMATS
def test_more_effort_never_loses(fmt: Format) -> None:
    fast, default, best = (ratio_to_ggml(fmt, "gauss", "mild", e) for e in ("fast", "default", "best"))
    assert best <= default <= fast


@FORMATS
@pytest.mark.parametrize("effort", ["fast", "default", "best"])
def test_nasty_blocks(fmt: Format, effort: Effort) -> None:
    assert casualties(fmt, effort) == []


def least_error(x: Tensor, w: Tensor) -> float:
    """Of IQ4_NL: every f16 step in reach tried, the nearest value for every weight."""
    total = 0.0
    for block, weight in zip(x, w, strict=True):
        size = float(block.abs().max())
        ends = torch.tensor([size / 400, size / 40]).half().view(torch.int16).tolist()
        step = torch.arange(ends[0], ends[1], dtype=torch.int16).view(torch.float16).float()[:, None]
        step = torch.cat([step, -step])
        error = (weight * (block - step * nearest(block / step, MIDS, VALUES)).square()).sum(1)
        total += float(error.min())
    return total


@pytest.mark.parametrize(("effort", "above"), [("fast", 1.02), ("default", 1.005), ("best", 1.0005)])
def test_nl_comes_close_to_the_least_error_there_is(effort: Effort, above: float) -> None:
    x, v = weights("heavy", rows=4, columns=512), importances("spiky", columns=512)
    w, blocks = objective(IQ4_NL, x, v), x.reshape(-1, 32)
    least = least_error(blocks, w)
    assert least * 0.9999 <= loss(w, blocks, IQ4_NL.decode(IQ4_NL.encode(blocks, w, effort))) <= above * least


def test_loops_fit_and_code_the_nearest_levels() -> None:
    g = torch.Generator().manual_seed(9)
    x, w = torch.randn(32, 101, generator=g), torch.rand(32, 101, generator=g)
    scales = (torch.rand(3, 101, generator=g) + 0.1) * torch.tensor([0.01, -0.02, 0.3])[:, None]
    scales[0, 5] = 0
    for scale, (a, b) in zip(inverse(scales), fit(x, w, inverse(scales)), strict=True):
        q = nearest(x * scale, MIDS, VALUES)
        torch.testing.assert_close(a, (w * q * x).sum(0), rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(b, (w * q * q).sum(0), rtol=1e-4, atol=1e-3)
        assert torch.equal(codes(x, scale), nearest(x * scale, MIDS, CODES).to(torch.uint8))
