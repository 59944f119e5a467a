"""A large matrix is rounded some rows at a time, with what came of it as a whole."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moequant import formats
from moequant.errors import CheckpointError
from moequant.rounding.feedback import Options
from moequant.rounding.paired import Grams, Seen
from moequant.rounding.results import Result
from moequant.rounding.rounder import Rounder, Rounding
from moequant.values import Origin, Place, Role, Site, Stack, Weight

ROWS, COLUMNS = 9_000, 64
QUICK = Options(effort="fast", rounds=1, threads=1)


def matrix(adds: bool) -> Weight:
    return Weight(
        "head",
        Role.OUTPUT,
        None,
        (ROWS, COLUMNS),
        Stack.NONE,
        Origin(()),
        Place("lm_head.weight"),
        Site("head", "lm_head"),
        adds=adds,
    )


def grams(weight: Weight) -> Grams:
    """Of a stream that is a little off, and of a residual error where the weight adds to the stream."""
    g = torch.Generator().manual_seed(1)
    found = Grams.empty(1, weight, "cpu")
    for half in range(2):
        exact = torch.randn(300, COLUMNS, generator=g) @ torch.randn(COLUMNS, COLUMNS, generator=g)
        rounded = exact + 0.1 * torch.randn(exact.shape, generator=g)
        residual = torch.randn(300, ROWS, generator=g) if weight.adds else None
        found.add(0, half, Seen(rounded, exact, residual=residual))
    return found


@pytest.mark.parametrize("adds", [False, True])
def test_bands_of_rows_lose_what_the_whole_loses(adds: bool) -> None:
    weight = matrix(adds)
    values = 0.02 * torch.randn(1, ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    seen = grams(weight)
    hessian = seen.own

    def rounded(band: int) -> Result:
        rounding = Rounding(options=QUICK, band=band)
        (found,) = Rounder({"head": "Q4_0"}, plain, rounding).round([weight], lambda _: values, hessian, seen)
        return found

    def plain(weight: Weight, name: str) -> Result:
        raise AssertionError("every row has a Hessian")

    (whole, all_lost), (bands, lost) = rounded(ROWS * COLUMNS), rounded(1)
    assert bands.data.shape == whole.data.shape == (1, ROWS, formats.get("Q4_0").row_bytes(COLUMNS))
    torch.testing.assert_close(lost.error, all_lost.error, rtol=1e-4, atol=0)
    same = (bands.data == whole.data).all(-1).double().mean()
    assert same > 0.99, "products of fewer rows are summed in another order, and ties may fall otherwise"
    assert lost.fallbacks == all_lost.fallbacks == ()


def test_a_useless_hessian_is_told_once_however_many_bands() -> None:
    weight = matrix(adds=False)
    seen = replace(grams(weight), halves=tuple(torch.zeros(2, 1, COLUMNS, COLUMNS)))
    values = torch.randn(1, ROWS, COLUMNS)
    rounder = Rounder({"head": "Q4_0"}, lambda *_: pytest.fail(), Rounding(options=QUICK, band=1))
    ((_, loss),) = rounder.round([weight], lambda _: values, seen.own, seen)
    assert len(loss.fallbacks) == 1


@pytest.mark.parametrize("first", [0, 4])
def test_what_a_format_cannot_hold_is_named(first: int) -> None:
    """The second of two weights, and the expert's number in the model, not among those that are rounded."""
    site, of = Site("experts", "mlp.experts"), Origin(())
    place, shape = Place("mlp.experts.up"), (8, 32, COLUMNS)
    gate, up = (
        Weight(name, role, 0, shape, Stack.EXPERTS, of, place, site)
        for name, role in (("gate", Role.GATE), ("up", Role.UP))
    )
    values = {name: 0.02 * torch.randn(4, 32, COLUMNS) for name in ("gate", "up")}
    values["up"][2, 5, 7] = -1e30
    alone = replace(gate, shape=(4, 32, COLUMNS))
    seen = Grams.empty(4, alone, "cpu")
    rounder = Rounder({"gate": "Q4_0", "up": "Q4_0"}, lambda *_: pytest.fail(), Rounding(options=QUICK))
    with pytest.raises(
        CheckpointError, match=rf"^up: Q4_0 cannot hold -1e\+30 of expert {first + 2}, "
    ) as told:
        rounder.round([gate, up], lambda each: values[each.name], seen.own, seen, range(first, first + 4))
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("band", [1, 1 << 25])
def test_weights_that_share_their_inputs_lose_what_they_lose_alone(band: int) -> None:
    """Those of one format and shape are rounded as one, each to its own values."""
    first = matrix(adds=False)
    names = {"head": "Q4_0", "other": "Q4_0", "fine": "Q8_0", "short": "Q4_0"}
    weights = [replace(first, name=name, shape=(ROWS - (name == "short"), COLUMNS)) for name in names]
    g = torch.Generator().manual_seed(2)
    values = {each.name: 0.02 * torch.randn(1, *each.shape, generator=g) for each in weights}
    seen = grams(first)
    rounder = Rounder(names, lambda *_: pytest.fail(), Rounding(options=QUICK, band=band))

    def rounded(some: list[Weight]) -> list[Result]:
        return rounder.round(some, lambda each: values[each.name], seen.own, seen)

    for weight, (packed, loss) in zip(weights, rounded(weights), strict=True):
        ((alone, lost),) = rounded([weight])
        assert (packed.weight, packed.format, loss.weight) == (weight, names[weight.name], weight.name)
        assert packed.data.shape == alone.data.shape
        assert (packed.data == alone.data).all(-1).double().mean() > 0.99
        torch.testing.assert_close(loss.error, lost.error, rtol=1e-3, atol=0)
