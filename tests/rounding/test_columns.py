"""Feedback against the textbook: GPTQ's loop over columns with the inverse Hessian, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moequant.formats import FORMATS
from moequant.rounding.columns import feed
from moequant.rounding.hessian import factorise
from moequant.rounding.lattice import Fields, lattice_of
from tests.rounding.data import correlated


def gptq(weights: Tensor, hessian: Tensor, order: Tensor, step: Tensor, offset: Tensor, top: tuple) -> Tensor:
    """Frantar et al. 2022, one column after another: weights, step, offset [out, in], order [in]; float64."""
    w, done = weights.double()[:, order].clone(), torch.zeros_like(weights, dtype=torch.float64)
    s, m = step.double()[:, order], offset.double()[:, order]
    inverse = torch.linalg.inv(hessian.double()[order][:, order])
    for k in range(w.shape[1]):
        level = ((w[:, k] + m[:, k]) / s[:, k]).round().clamp(*top)
        done[:, k] = s[:, k] * level - m[:, k]
        left = (w[:, k] - done[:, k]) / inverse[k, k]
        w[:, k + 1 :] -= left[:, None] * inverse[k, k + 1 :]
        inverse = inverse - inverse[:, k : k + 1] @ inverse[k : k + 1] / inverse[k, k]
    return done[:, order.argsort()]


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "Q2_K", "Q4_K", "Q6_K"])
def test_matches_the_textbook(name: str) -> None:
    fmt = FORMATS[name]
    lattice = lattice_of(fmt)
    weights, hessian = correlated(2, 24, 256, 700)
    scales = fmt.encode(
        weights.reshape(-1, fmt.block), torch.ones(weights.numel() // fmt.block, fmt.block), "fast"
    )
    fixed = lattice.read(scales.view(2, 24, -1))
    factored, _ = factorise(lattice, hessian, 0.01)

    def encode(_: Tensor, begin: int, end: int) -> Fields:
        assert (begin, end) == (0, 256)
        return lattice.read(scales.view(2, 24, -1))

    ours = lattice.value(feed(lattice, weights.mT.contiguous(), factored, encode)).mT
    step = lattice.spread(lattice.step(fixed), lattice.sub).mT
    offset = lattice.offset(fixed)
    shift = torch.zeros_like(step) if offset is None else lattice.spread(offset, lattice.sub).mT
    for e in range(2):
        top = (lattice.levels[0], lattice.levels[-1])
        theirs = gptq(weights[e], factored.damped[e], factored.order[e], step[e], shift[e], top)
        # One code that f32 rounds otherwise changes all that come after it in its row.
        same = ((ours[e] - theirs).abs() < 1e-6).double().mean()
        assert same > 0.95, float(same)
        mine, book = (((weights[e] - q).double() @ factored.damped[e].double()) for q in (ours[e], theirs))
        a = float((mine * (weights[e] - ours[e])).sum())
        b = float((book * (weights[e] - theirs)).sum())
        assert a == pytest.approx(b, rel=5e-3)


def test_later_spans_make_up_for_earlier_ones() -> None:
    """With two spans, feedback into the second lowers the error below that of two separate roundings."""
    fmt = FORMATS["Q4_K"]
    lattice = lattice_of(fmt)
    weights, hessian = correlated(1, 32, 512, 2000)
    factored, _ = factorise(lattice, hessian, 0.01)

    def encode(x: Tensor, begin: int, end: int) -> Fields:
        rows = x.mT.reshape(-1, 256)
        return lattice.read(fmt.encode(rows, torch.ones_like(rows), "fast").view(1, 32, -1))

    def error(q: Tensor) -> float:
        e = (weights - q.mT).double()[0]
        return float(((e @ hessian[0].double()) * e).sum())

    together = lattice.value(feed(lattice, weights.mT.contiguous(), factored, encode))
    apart = []
    for begin in (0, 256):
        own = slice(begin, begin + 256)
        part, _ = factorise(lattice, hessian[:, own, own], 0.01)
        apart.append(lattice.value(feed(lattice, weights[:, :, own].mT.contiguous(), part, encode)))
    assert error(together) < 0.9 * error(torch.cat(apart, 1))
