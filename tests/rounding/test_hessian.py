"""Factors multiply to what they stand for, and bad Hessians are told apart."""

from __future__ import annotations

import pytest
import torch

from moequant.formats import FORMATS
from moequant.rounding.hessian import factorise, spans, trouble
from moequant.rounding.lattice import lattice_of
from tests.rounding.data import correlated


@pytest.mark.parametrize("name", ["Q4_K", "Q8_0", "IQ2_S", "IQ3_S"])
def test_factors_multiply_to_the_damped_hessian(name: str) -> None:
    lattice = lattice_of(FORMATS[name])
    _, hessian = correlated(2, 1, 512, 900)
    factored, damping = factorise(lattice, hessian, 0.02)
    assert damping.tolist() == [0.02, 0.02]
    for e in range(2):
        order = factored.order[e]
        assert sorted(order.tolist()) == list(range(512))
        for begin, end in spans(lattice, 512):
            assert sorted(order[begin:end].tolist()) == list(range(begin, end))
        unit, corner = factored.unit[e].double(), factored.corner[e].double()
        blocks = torch.block_diag(*(corner @ corner.mT))
        even = hessian[e].double() / hessian[e].diagonal().double().mean()
        expected = (even + 0.02 * torch.eye(512))[order][:, order]
        torch.testing.assert_close(unit @ blocks @ unit.mT, expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(
            factored.damped[e].double()[order][:, order], expected, rtol=1e-4, atol=1e-5
        )


def test_the_largest_diagonal_comes_first() -> None:
    _, hessian = correlated(1, 1, 512, 900)
    factored, _ = factorise(lattice_of(FORMATS["Q4_K"]), hessian, 0.01)
    diagonal = hessian[0].diagonal()[factored.order[0]]
    assert (diagonal[:256].diff() <= 0).all()
    assert (diagonal[256:].diff() <= 0).all()


def test_damping_grows_until_it_suffices() -> None:
    g = torch.Generator().manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(64, 64, generator=g, dtype=torch.float64))
    values = torch.linspace(0.1, 2, 64, dtype=torch.float64)
    values[0] = -0.05  # not a Hessian, but what sums in low precision can give
    bad = (q * values) @ q.T
    _, good = correlated(1, 1, 64, 300)
    _, damping = factorise(lattice_of(FORMATS["Q8_0"]), torch.stack([bad.float(), good[0]]), 0.001)
    assert damping[1] == 0.001
    assert damping[0] == pytest.approx(0.1)


def test_hopeless_hessians_have_infinite_damping() -> None:
    hopeless = torch.eye(32) - 5 * torch.ones(32, 32) * (1 - torch.eye(32))
    _, damping = factorise(lattice_of(FORMATS["Q8_0"]), hopeless[None], 0.01)
    assert damping.tolist() == [torch.inf]


def test_troubles_have_reasons() -> None:
    h = torch.eye(32).repeat(5, 1, 1)
    h[1, 3, 4] = torch.nan
    h[2, 5, 5] = torch.inf
    h[3] = 0
    h[4, 0, 0] = -1
    reasons = trouble(h)
    assert reasons[0] is None
    assert [str(r) for r in reasons[1:]] == [
        "the Hessian is not finite",
        "the Hessian is not finite",
        "no input was seen",
        "the Hessian has a negative diagonal",
    ]
