"""Memory layouts and the small numeric helpers that every search stands on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moequant.formats import layout


@given(n=st.integers(1, 40), subs=st.integers(1, 4), sub=st.sampled_from([4, 16, 32]))
def test_lanes_and_back(n: int, subs: int, sub: int) -> None:
    x = torch.arange(n * subs * sub, dtype=torch.float32).view(n, -1)
    lanes = layout.to_lanes(x, sub, fill=-1.0)
    assert lanes.shape == (-(-n // layout.LANES), subs, sub, layout.LANES)
    assert torch.equal(layout.from_lanes(lanes, n), x)
    assert int((lanes == -1).sum()) == -n % layout.LANES * subs * sub


@given(n=st.integers(1, 5), run=st.sampled_from([4, 16, 32, 64]), groups=st.integers(1, 3))
def test_nibbles_and_back(n: int, run: int, groups: int) -> None:
    codes = torch.randint(0, 16, (n, 2 * run * groups), dtype=torch.uint8)
    packed = layout.join_nibbles(codes, run)
    assert torch.equal(layout.split_nibbles(packed, run), codes)
    assert torch.equal(packed[:, :run], codes[:, :run] | codes[:, run : 2 * run] << 4)


@given(st.floats(-65504, 65504, width=32))
def test_halves_are_what_f16_stores(value: float) -> None:
    x = torch.tensor([value])
    stored = layout.half_bytes(layout.half(x)).view(torch.float16).float()[0]
    assert torch.equal(layout.half(x), stored)
    near = layout.signed_half(x)
    assert torch.equal(near.sign(), x.sign())
    assert torch.equal(near.half().float(), near)
    assert torch.equal(layout.positive_half(x.abs()), near.abs())


@given(st.floats(0, 2.0**-14, width=32))
def test_storable_is_f16_below_its_normal_numbers(value: float) -> None:
    x = torch.tensor([value])
    assert torch.equal(layout.storable(x), layout.half(x).clamp_min(2.0**-24))


def test_halves_saturate() -> None:
    assert layout.half(torch.tensor([1e9, -1e9])).tolist() == [65504.0, -65504.0]


@pytest.mark.parametrize("top", [3, 15, 31])
def test_clip_is_clamp(top: int) -> None:
    x = torch.linspace(-5, 40, 91).round()
    assert torch.equal(layout.clip(x, top), x.clamp(0, top))


def test_inverse_of_nothing_is_nothing() -> None:
    assert layout.inverse(torch.tensor([0.0, -0.0, 4.0])).tolist() == [0.0, 0.0, 0.25]


def test_better_takes_the_lesser_and_keeps_ties() -> None:
    a = (torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 20.0, 30.0]))
    b = (torch.tensor([0.5, 2.0, torch.nan]), torch.tensor([11.0, 21.0, 31.0]))
    error, value = layout.better(a, b)
    assert error.tolist() == [0.5, 2.0, 3.0]
    assert value.tolist() == [11.0, 20.0, 30.0]
