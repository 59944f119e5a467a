"""Groups of integers, as safetensors folders hold them, rounded under Hessians like any block format."""

from __future__ import annotations

import pytest
import torch

from moequant import formats
from moequant.formats import Format
from moequant.formats.groups import GroupFormat
from moequant.rounding import Options, round_to_hessian
from moequant.rounding.lattice import lattice_of
from tests.rounding.data import correlated, lost

BF16, F16 = torch.bfloat16, torch.float16
QUICK = Options(effort="fast", rounds=1, threads=1)
KINDS = [
    GroupFormat(4, 128),
    GroupFormat(4, 32, (F16,)),
    GroupFormat(4, -1),
    GroupFormat(8, 64, (BF16, F16)),
    GroupFormat(8, -1, (BF16,)),
]
EVERY = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.of_rows(512).name)


def plain(fmt: Format, weights: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    return formats.quantize(fmt, weights, hessian.diagonal(dim1=1, dim2=2).double(), "fast", threads=1)


@EVERY
def test_less_is_lost_than_by_the_plain_search(kind: GroupFormat) -> None:
    weights, hessian = correlated(2, 24, 512, 3000)
    fmt = kind.of_rows(512)
    rounded = round_to_hessian(fmt, weights, hessian, QUICK)
    assert not rounded.fallbacks
    error = lost(fmt, weights, rounded.data, hessian)
    assert (error / lost(fmt, weights, plain(fmt, weights, hessian), hessian)).max() < 0.6


@EVERY
def test_fields_and_bytes_are_inverse(kind: GroupFormat) -> None:
    fmt = kind.of_rows(512)
    weights, hessian = correlated(2, 5, 512, 600)
    data = plain(fmt, weights, hessian)
    lattice = lattice_of(fmt)
    fields = lattice.read(data)
    assert torch.equal(lattice.write(fields), data)
    # Loaders multiply in the scale's own precision, rounding happens without that last step.
    value, decoded = lattice.value(fields).transpose(1, 2), formats.dequantize(fmt, data)
    assert bool(((value - decoded).abs() <= 2.0**-8 * decoded.abs()).all())


@pytest.mark.parametrize(("bits", "n_in"), [(4, 40), (8, 36), (4, 1000)])
def test_rows_that_no_tile_divides(bits: int, n_in: int) -> None:
    """One scale a row, of any length that words can hold."""
    fmt = GroupFormat(bits, -1).of_rows(n_in)
    weights, hessian = correlated(3, 7, n_in, 4 * n_in)
    rounded = round_to_hessian(fmt, weights, hessian, QUICK)
    assert rounded.data.shape == (3, 7, fmt.row_bytes(n_in))
    both = rounded.data, plain(fmt, weights, hessian)
    ours, plainly = (lost(fmt, weights, data, hessian) for data in both)
    assert bool((ours < 0.8 * plainly).all())


def test_scales_are_solved_to_what_the_file_can_hold() -> None:
    """Scales that f16 holds only as subnormals are moved in its steps, and never to 0."""
    fmt = GroupFormat(4, 64, (BF16, F16)).of_rows(128)
    weights, hessian = correlated(1, 16, 128, 1000)
    small = weights * (1e-6 / weights.abs().mean())
    found = round_to_hessian(fmt, small, hessian, Options(effort="fast", rounds=4, threads=1))
    again = lattice_of(fmt).read(found.data).d
    assert bool((again != 0).all()) and bool((again.abs() < 2.0**-14).any())
    both = found.data, plain(fmt, small, hessian)
    ours, plainly = (float(lost(fmt, small, data, hessian)) for data in both)
    assert ours < plainly


def test_the_fisher_of_the_outputs_counts() -> None:
    fmt = GroupFormat(4, 128).of_rows(256)
    weights, hessian = correlated(2, 24, 256, 2000)
    made = torch.randn(2, 24, 200, generator=torch.Generator().manual_seed(2))
    fisher = (made @ made.mT) * torch.linspace(0.1, 3, 24).outer(torch.linspace(0.1, 3, 24))
    felt = [round_to_hessian(fmt, weights, hessian, QUICK, fisher=each).data for each in (None, fisher)]

    def cost(data: torch.Tensor) -> float:
        off = weights - formats.dequantize(fmt, data)
        return float((fisher @ off @ hessian * off).sum())

    assert cost(felt[1]) < cost(felt[0])


def test_experts_without_a_usable_hessian_fall_back_and_say_so() -> None:
    fmt = GroupFormat(4, 64).of_rows(128)
    weights, hessian = correlated(3, 8, 128, 1000)
    hessian[1] = 0
    rounded = round_to_hessian(fmt, weights, hessian, QUICK)
    assert [(bad.expert, bad.reason) for bad in rounded.fallbacks] == [(1, "no input was seen")]
    assert torch.equal(rounded.data[1], formats.quantize(fmt, weights[1], None, "fast", threads=1))
