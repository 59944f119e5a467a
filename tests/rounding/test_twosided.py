"""Descent under Hessian and Fisher: never upwards, and lower than what the Hessian alone reaches."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from moequant.formats import FORMATS
from moequant.rounding import Options, round_to_hessian
from moequant.rounding.feedback import outputs_lost
from moequant.rounding.lattice import lattice_of
from moequant.rounding.twosided import accepted, descend_two_sided, even_fisher
from tests.rounding.data import correlated

NAMES = ["Q2_K", "Q4_K", "Q6_K", "Q8_0", "IQ4_XS", "MXFP4", "IQ2_S", "IQ3_XXS", "IQ1_S"]
QUICK = Options(effort="fast", rounds=1, threads=1)


def fisher_of(experts: int, rows: int, seed: int = 3) -> Tensor:
    """f32 [E, rows, rows] of gradients that share directions."""
    _, fisher = correlated(experts, 1, rows, 8 * rows, seed)
    return fisher / 1e6


def objective(error: Tensor, hessian: Tensor, fisher: Tensor) -> Tensor:
    """f64 [E]: tr(G E H Eᵀ) of error [E, in, R]."""
    e = error.double()
    return torch.einsum("eir,eij,ejs,ers->e", e, hessian.double(), e, fisher.double())


@pytest.mark.parametrize("name", NAMES)
def test_every_round_lowers_the_objective(name: str) -> None:
    fmt = FORMATS[name]
    lattice = lattice_of(fmt)
    weights, hessian = correlated(2, 40, 256, 800)
    hessian = hessian / hessian.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    fisher = even_fisher(fisher_of(2, 40))
    x = weights.reshape(-1, fmt.block)
    fields = lattice.read(fmt.encode(x, torch.ones_like(x), "fast").view(2, 40, -1))
    target = weights.mT.contiguous()
    lost = [objective(target - lattice.value(fields), hessian, fisher)]
    for _ in range(2):
        descend_two_sided(lattice, target, fields, hessian, fisher, 1)
        lost.append(objective(target - lattice.value(fields), hessian, fisher))
    assert all((after < before).all() for before, after in pairwise(lost))
    again = lattice.read(lattice.write(fields))
    assert torch.equal(lattice.value(again), lattice.value(fields))


def test_accepted_moves_lower_the_objective_together() -> None:
    g = torch.Generator().manual_seed(4)
    _, hessian = correlated(3, 1, 64, 100)
    fisher = fisher_of(3, 24) * 1e6
    error = torch.randn(3, 64, 24, generator=g)
    batch = torch.arange(0, 24, 2)
    moved = -0.4 * error[:, :, batch] + 0.5 * torch.randn(3, 64, 12, generator=g)
    kept = accepted(moved, (error @ fisher)[:, :, batch], hessian, fisher[:, batch][:, :, batch])
    assert 0 < kept.sum() < kept.numel()
    before = objective(error, hessian, fisher)
    after = error.clone()
    after[:, :, batch] += torch.where(kept[:, None], moved, 0.0)
    assert (objective(after, hessian, fisher) < before).all()
    for e, i in (~kept).nonzero().tolist():  # and those refused that come last would have raised it
        if not kept[e, i:].any():
            worse = after.clone()
            worse[e, :, batch[i]] += moved[e, :, i]
            assert objective(worse, hessian, fisher)[e] > objective(after, hessian, fisher)[e]


@pytest.mark.parametrize("name", NAMES)
def test_loses_less_of_what_the_loss_feels(name: str) -> None:
    weights, hessian = correlated(2, 48, 256, 1500)
    fisher = fisher_of(2, 48)
    one = round_to_hessian(name, weights, hessian, QUICK)
    two = round_to_hessian(name, weights, hessian, QUICK, fisher)

    def felt(data: Tensor) -> float:
        return float(
            sum(outputs_lost(FORMATS[name], *e) for e in zip(weights, data, hessian, fisher, strict=True))
        )

    assert not two.fallbacks
    assert felt(two.data) < 0.93 * felt(one.data)


def test_one_fisher_may_serve_all_experts() -> None:
    weights, hessian = correlated(2, 32, 256, 700)
    fisher = fisher_of(1, 32)[0]
    one = round_to_hessian("Q4_K", weights, hessian, QUICK, fisher)
    each = round_to_hessian("Q4_K", weights, hessian, QUICK, fisher.repeat(2, 1, 1))
    assert torch.equal(one.data, each.data)


def test_a_bad_fisher_leaves_the_hessian_alone() -> None:
    weights, hessian = correlated(4, 32, 256, 700)
    fisher = fisher_of(4, 32)
    fisher[0, 1, 2] = torch.nan
    fisher[2] = 0
    hessian[3] = 0
    rounded = round_to_hessian("Q4_K", weights, hessian, QUICK, fisher)
    assert [(f.expert, f.reason, f.instead) for f in rounded.fallbacks] == [
        (0, "the Fisher is not finite", "Hessian alone"),
        (2, "the Fisher is zero", "Hessian alone"),
        (3, "no input was seen", "plain search"),
    ]
    plain = round_to_hessian("Q4_K", weights, hessian, QUICK)
    errors = [
        torch.stack([outputs_lost(FORMATS["Q4_K"], weights[e], each.data[e], hessian[e]) for e in (0, 2)])
        for each in (rounded, plain)
    ]
    torch.testing.assert_close(*errors, rtol=0.05, atol=0)


def test_rows_that_the_loss_does_not_feel_stay() -> None:
    weights, hessian = correlated(1, 32, 256, 700)
    fisher = fisher_of(1, 32)
    fisher[:, 5] = 0
    fisher[:, :, 5] = 0
    one = round_to_hessian("Q4_K", weights, hessian, QUICK)
    two = round_to_hessian("Q4_K", weights, hessian, QUICK, fisher)
    assert torch.equal(one.data[0, 5], two.data[0, 5])
    assert not torch.equal(one.data[0, 6], two.data[0, 6])
