"""Nearest values, ladders and the proposal of a shared scale."""

from __future__ import annotations

import pytest
import torch

from moequant.formats.codebook import (
    Ladder,
    inverse,
    midpoints,
    nearest,
    propose,
    propose_by_torch,
    ratio,
    u16_bytes,
    u16_from,
)

VALUES = [-9.0, -2.0, 0.5, 1.0, 7.0]


@pytest.mark.parametrize("compiled", [False, True])
def test_nearest_is_the_nearest(compiled: bool) -> None:
    # Traced, it is a chain of compares; the tracer alone tells whether that chain is right.
    find = torch.compile(nearest, backend="eager") if compiled else nearest
    t = torch.linspace(-12, 9, 1000)
    found = find(t, midpoints(VALUES), VALUES)
    values = torch.tensor(VALUES)
    assert torch.equal((t - found).abs(), (t[:, None] - values).abs().min(1).values)


def test_a_border_belongs_to_the_value_below() -> None:
    """As `bucketize` has it, for what lies just beside a border and for what is too large."""
    borders, values = torch.tensor(midpoints(VALUES)), torch.tensor(VALUES)
    beside = [torch.nextafter(borders, borders + sign) for sign in (-1, 1)]
    far = torch.tensor([-torch.inf, -1e38, -0.0, 1e-40, 1e38, torch.inf])
    t = torch.cat([borders, *beside, far])
    assert torch.equal(nearest(t, midpoints(VALUES), VALUES), values[torch.bucketize(t, borders)])


def test_a_ladder_snaps_to_its_rungs() -> None:
    ladder = Ladder(1, 31, 2)
    v = torch.linspace(-5, 40, 500)
    rungs = torch.arange(1.0, 32.0, 2.0)
    snapped = ladder.snap(v)
    assert torch.isin(snapped, rungs).all()
    torch.testing.assert_close((v - snapped).abs(), (v[:, None] - rungs).abs().min(1).values)


@pytest.mark.parametrize("ladder", [Ladder(1, 31, 2), Ladder(-32, 31, 1), Ladder(1, 15, 2)])
def test_scales_on_a_ladder_are_recovered(ladder: Ladder) -> None:
    g = torch.Generator().manual_seed(0)
    level = ladder.snap(torch.rand(8, 50, generator=g) * (ladder.highest - ladder.lowest) + ladder.lowest)
    level[0] = ladder.highest
    level[1:] = level[1:].clamp_min(-ladder.highest)
    d = torch.rand(50, generator=g) + 0.1
    reach = torch.tensor([0.8, 1.0]) * ladder.highest
    found = propose(level, level * d, torch.ones_like(level), reach, ladder)
    torch.testing.assert_close(ladder.snap(level * d * inverse(found)) * found, level * d)


@pytest.mark.parametrize("ladder", [Ladder(-32, 31, 1), Ladder(1, 31, 2)])
def test_loops_propose_the_same(ladder: Ladder) -> None:
    g = torch.Generator().manual_seed(8)
    scale = torch.randn(8, 203, generator=g) if ladder.lowest < 0 else torch.rand(8, 203, generator=g)
    scale[:, 3] = 0
    reach = torch.linspace(0.75, 1, 8) * ladder.highest
    curvature = torch.rand(8, 203, generator=g) + 0.1
    found = propose(scale, scale, curvature, reach, ladder)
    known = propose_by_torch(scale, scale, curvature, reach, ladder)
    near = (found - known).abs() <= 1e-5 * known.abs()
    assert float(near.float().mean()) > 0.98 and float(found[3]) == 0  # nearly as good ones may change places


def test_divisions_by_zero_give_zero() -> None:
    x = torch.tensor([0.0, 1e-40, 2.0])
    assert inverse(x).tolist() == [0.0, 0.0, 0.5]
    assert ratio(torch.ones(3), x).tolist() == [0.0, 0.0, 0.5]


def test_u16_round_trip() -> None:
    value = torch.tensor([[0, 1, 255], [256, 0x1234, 65535]])
    assert u16_bytes(value).tolist()[1] == [0, 1, 0x34, 0x12, 255, 255]
    assert torch.equal(u16_from(u16_bytes(value)), value.to(torch.int32))
