"""Sizes as people write them."""

from __future__ import annotations

import pytest

from moequant.containers.gguf.sizes import Budget, parse_size
from moequant.errors import PlanError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("3300000", 3_300_000),
        ("14G", 14_000_000_000),
        ("14GB", 14_000_000_000),
        ("14gb", 14_000_000_000),
        ("13.5GiB", 14_495_514_624),
        ("800M", 800_000_000),
        (" 0.5 T ", 500_000_000_000),
        ("64KiB", 65_536),
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "14X", "14 G B", "-3G", "1e9", "14iB", "0", "nan"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(PlanError, match="size"):
        parse_size(text)


@pytest.mark.parametrize("bpw", [0.0, -1.0, float("nan"), float("inf")])
def test_bits_per_weight_are_positive(bpw: float) -> None:
    with pytest.raises(PlanError, match="above 0"):
        Budget.of_bpw(bpw)


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(PlanError, match=r"Q9_Z.*Q6_K.*and 20 more"):
        Budget.of_preset("Q9_Z")
