"""Whole expert tensors: less lost than by the plain search, nothing silent, whatever the input."""

from __future__ import annotations

import pytest
import torch

from moequant import formats
from moequant.errors import FormatError
from moequant.formats import FORMATS, Format, engine
from moequant.rounding import Options, round_to_hessian
from moequant.rounding.feedback import energy, outputs_lost
from tests.rounding.data import BLOCK_FORMATS, correlated, lost

EVERY = pytest.mark.parametrize("fmt", BLOCK_FORMATS, ids=lambda f: f.name)
QUICK = Options(effort="fast", rounds=1, threads=1)


def plain(fmt: Format, weights: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    return formats.quantize(fmt, weights, hessian.diagonal(dim1=1, dim2=2), "fast", threads=1)


@EVERY
def test_loses_less_than_the_plain_search(fmt: Format) -> None:
    weights, hessian = correlated(2, 24, 512, 3000)
    rounded = round_to_hessian(fmt, weights, hessian, QUICK)
    assert not rounded.fallbacks
    assert rounded.damping.tolist() == [0.01, 0.01]
    error = lost(fmt, weights, rounded.data, hessian)
    told = [outputs_lost(fmt, *each) for each in zip(weights, rounded.data, hessian, strict=True)]
    torch.testing.assert_close(torch.stack(told), error, rtol=1e-4, atol=0)
    assert (error / lost(fmt, weights, plain(fmt, weights, hessian), hessian)).max() < 0.65


@pytest.mark.parametrize("columns", [1, 32, 256, 257, 800])
def test_every_pair_of_columns_has_its_energy(columns: int) -> None:
    rows, inputs = torch.randn(5, columns), torch.randn(columns + 40, columns)
    exact = (rows.double() @ inputs.double().mT).square().sum()
    torch.testing.assert_close(energy(rows, inputs.mT @ inputs), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_0", "IQ2_S"])
def test_an_expert_is_rounded_to_the_same_bytes_whoever_is_with_it(name: str) -> None:
    weights, hessian = correlated(3, 40, 256, 300)
    options = Options(threads=2, of=1)
    together = round_to_hessian(name, weights, hessian, options)
    alone = [round_to_hessian(name, weights[e : e + 1], hessian[e : e + 1], options) for e in range(3)]
    assert torch.equal(together.data, torch.cat([each.data for each in alone]))


@pytest.mark.parametrize("experts", [1, 3])
def test_encoders_see_one_layout(experts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled kernels are compiled anew for other strides: at the eighth, torch warns and gives up."""
    seen = set()

    def spy(fmt: Format, blocks: engine.Blocks, *rest: object) -> torch.Tensor:
        seen.update((each.stride(), each.is_contiguous()) for each in (blocks.x, blocks.importance))
        return encode(fmt, blocks, *rest)

    encode = engine._encode
    monkeypatch.setattr(engine, "_encode", spy)
    for rows in (24, 40):
        weights, hessian = correlated(experts, rows, 256, 300)
        round_to_hessian("Q3_K", weights, hessian, Options(effort="fast", rounds=0, threads=1))
    assert seen == {((256, 1), True)}


@pytest.mark.parametrize("name", ["Q4_K", "Q3_K", "IQ2_S", "IQ3_XXS", "Q8_0", "NVFP4"])
def test_rounds_help(name: str) -> None:
    weights, hessian = correlated(2, 24, 512, 3000)
    made = [round_to_hessian(name, weights, hessian, Options(effort="fast", rounds=n)) for n in (0, 1, 3)]
    errors = [lost(formats.get(name), weights, each.data, hessian).sum() for each in made]
    assert errors[2] < errors[1] < errors[0]


@pytest.mark.parametrize("name", ["Q2_K", "IQ3_XXS"])
def test_wide_rows_gain_as_much(name: str) -> None:
    ratios = []
    for columns in (256, 1024):
        weights, hessian = correlated(1, 32, columns, 8 * columns)
        fmt = FORMATS[name]
        both = round_to_hessian(name, weights, hessian, QUICK).data, plain(fmt, weights, hessian)
        ours, plainly = (lost(fmt, weights, data, hessian) for data in both)
        ratios.append(float(ours / plainly))
    assert ratios[1] < ratios[0] + 0.05


@pytest.mark.parametrize("name", ["Q4_K", "IQ2_XS"])
def test_memory_and_threads_do_not_change_the_result(name: str) -> None:
    weights, hessian = correlated(3, 20, 256, 700)
    one = round_to_hessian(name, weights, hessian, Options(effort="fast", threads=1))
    many = round_to_hessian(name, weights, hessian, Options(effort="fast", threads=3, memory=1))
    # Products of other shapes add in another order.
    assert (one.data == many.data).double().mean() > 0.9
    errors = [lost(FORMATS[name], weights, each.data, hessian) for each in (one, many)]
    torch.testing.assert_close(*errors, rtol=2e-2, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_float_will_do(dtype: torch.dtype) -> None:
    weights, hessian = correlated(1, 8, 256, 700)
    low = weights.to(dtype)
    a = round_to_hessian("Q4_K", low, hessian.double(), QUICK)
    b = round_to_hessian("Q4_K", low.float(), hessian, QUICK)
    errors = [lost(FORMATS["Q4_K"], low.float(), each.data, hessian) for each in (a, b)]
    torch.testing.assert_close(*errors, rtol=1e-2, atol=0)


def test_bad_hessians_fall_back_and_say_so() -> None:
    weights, hessian = correlated(6, 16, 256, 700)
    hessian[1, 7, 9] = torch.nan
    hessian[2] = 0
    hessian[3, 5, 5] = torch.inf
    hessian[4] = torch.eye(256) - 5 * (1 - torch.eye(256))
    rounded = round_to_hessian("Q4_K", weights, hessian, QUICK)
    assert [(f.expert, f.reason) for f in rounded.fallbacks] == [
        (1, "the Hessian is not finite"),
        (2, "no input was seen"),
        (3, "the Hessian is not finite"),
        (4, "the Hessian does not factorise, whatever the damping"),
    ]
    assert torch.isnan(rounded.damping).tolist() == [False, True, True, True, True, False]
    decoded = formats.dequantize("Q4_K", rounded.data)
    assert ((decoded - weights).square().sum((1, 2)) < 0.02 * weights.square().sum((1, 2))).all()
    good = round_to_hessian("Q4_K", weights[[0, 5]], hessian[[0, 5]], QUICK)
    both = rounded.data[[0, 5]], good.data
    errors = [lost(FORMATS["Q4_K"], weights[[0, 5]], data, hessian[[0, 5]]) for data in both]
    torch.testing.assert_close(*errors, rtol=1e-2, atol=0)


@EVERY
def test_fewer_tokens_than_columns(fmt: Format) -> None:
    """A Hessian of rank 20 leaves most directions free; the weights must not run away along them."""
    weights, hessian = correlated(2, 16, 256, 20)
    rounded = round_to_hessian(fmt, weights, hessian, QUICK)
    assert not rounded.fallbacks
    both = rounded.data, plain(fmt, weights, hessian)
    ours, plainly = (lost(fmt, weights, data, hessian) for data in both)
    assert (ours < plainly).all()
    decoded = formats.dequantize(fmt, rounded.data)
    # Outputs on other tokens are no random numbers either.
    coarse = formats.dequantize(fmt, plain(fmt, weights, hessian))
    assert (decoded - weights).square().sum() < 6 * (coarse - weights).square().sum()


@EVERY
def test_survives_nasty_weights(fmt: Format) -> None:
    weights, hessian = correlated(1, 8, 256, 700)
    weights = weights[0].clone()
    weights[0] = 0
    weights[1] = 0.3
    weights[2, 17] = 60.0
    weights[3] *= 1e-6
    weights[4, :128] = 0
    weights[5] = -weights[5].abs()
    rounded = round_to_hessian(fmt, weights[None], hessian, QUICK)
    decoded = formats.dequantize(fmt, rounded.data)[0]
    assert torch.isfinite(decoded).all()
    size = torch.einsum("oi,ij,oj->o", weights, hessian[0], weights)
    off = torch.einsum("oi,ij,oj->o", decoded - weights, hessian[0], decoded - weights)
    assert (off <= size * 1.01 + 1e-12).all()  # never worse than storing zeros
    assert (decoded[0] == 0).all()


def test_dead_columns_keep_their_weights() -> None:
    weights, hessian = correlated(1, 16, 256, 700)
    dead = torch.arange(0, 256, 5)
    hessian[:, dead] = 0
    hessian[:, :, dead] = 0
    rounded = round_to_hessian("Q4_K", weights, hessian, QUICK)
    assert not rounded.fallbacks
    off = formats.dequantize("Q4_K", rounded.data) - weights
    assert off[..., dead].square().mean() < 0.02 * weights[..., dead].square().mean()


def test_shapes_and_weights_are_checked() -> None:
    weights, hessian = correlated(2, 4, 256, 300)
    with pytest.raises(FormatError, match=r"\[experts, in, in\], not \[2, 256\]"):
        round_to_hessian("Q4_K", weights, hessian[:, 0], QUICK)
    with pytest.raises(FormatError, match="cannot hold rows of 96"):
        round_to_hessian("Q4_K", weights[..., :96], hessian[:, :96, :96], QUICK)
    weights[1, 2, 3] = torch.nan
    with pytest.raises(FormatError, match="weights of expert 1: they must be finite"):
        round_to_hessian("Q4_K", weights, hessian, QUICK)
    with pytest.raises(FormatError, match="F16 has no blocks"):
        round_to_hessian("F16", weights, hessian, QUICK)
