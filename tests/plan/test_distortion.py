"""Distorted weights have the error that was asked for, and cost what a format with that error costs."""

from __future__ import annotations

import pytest
import torch

from moequant import formats
from moequant.plan.distortion import AT_ONCE, distorted


def relative(x: torch.Tensor, y: torch.Tensor, columns: torch.Tensor | None = None) -> torch.Tensor:
    """Of every matrix, in float64."""
    share = torch.ones_like(x[..., 0, :]) if columns is None else columns
    share = share.double()[..., None, :]
    return ((x - y).double().square() * share).sum((-2, -1)) / (x.double().square() * share).sum((-2, -1))


@pytest.mark.parametrize("error", [0.25, 0.06, 5e-3, 2e-5])
@pytest.mark.parametrize("width", [256, 96, 50])
def test_the_error_is_the_one_asked_for(error: float, width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(3, 40, width, generator=generator) * torch.rand(3, 40, 1, generator=generator)
    x[1, :, 7] *= 30  # a channel of outliers
    columns = torch.rand(3, width, generator=generator).square()
    columns[2, ::3] = 0
    found = distorted(x.bfloat16(), error, columns)
    assert found.dtype == torch.float32 and found.shape == x.shape
    # Where an error is finer than float32 keeps apart it is not exact.
    wanted = torch.full((3,), error, dtype=torch.float64)
    torch.testing.assert_close(relative(x.bfloat16(), found, columns), wanted, rtol=2e-3, atol=0.0)


def test_a_matrix_alone_is_distorted_as_among_others() -> None:
    x = torch.randn(4, 64, 128, generator=torch.Generator().manual_seed(0))
    columns = torch.rand(4, 128, generator=torch.Generator().manual_seed(1))
    together = distorted(x, 0.05, columns)
    assert torch.equal(together[2], distorted(x[2], 0.05, columns[2]))
    assert torch.equal(together[1:3], distorted(x[1:3], 0.05, columns[1:3]))


def test_a_large_matrix_is_distorted_in_runs_of_rows() -> None:
    width = 1 << 14
    x = torch.randn(AT_ONCE // width + 3, width, generator=torch.Generator().manual_seed(0))
    found = distorted(x, 0.05, None)
    assert relative(x[-3:], found[-3:]).item() == pytest.approx(0.05, rel=1e-4)


@pytest.mark.parametrize("value", [0.0, 1e-30])
def test_what_is_zero_or_does_not_count_stays(value: float) -> None:
    x = torch.full((2, 8, 64), value)
    found = distorted(x, 0.05, torch.zeros(2, 64))
    assert torch.equal(found, x)


@pytest.mark.parametrize("name", ["Q3_K", "IQ3_S", "Q4_0"])
def test_outputs_are_off_as_much_as_with_a_format(name: str) -> None:
    """Of inputs that are correlated: the error of the product is what a model sees."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(256, 512, generator=generator)
    mixed = torch.randn(512, 512, generator=generator) * torch.logspace(0, -1.5, 512)
    inputs = torch.randn(400, 512, generator=generator) @ mixed
    columns = inputs.square().mean(0)
    real = formats.dequantize(name, formats.quantize(name, x, columns))
    error = relative(x, real, columns).item()
    found = distorted(x, error, columns)
    outputs = inputs @ x.T
    ours, theirs = ((inputs @ y.T - outputs).square().mean() for y in (found, real))
    assert float(ours / theirs) == pytest.approx(1, rel=0.1)
