"""Q2_K, Q3_K, Q4_K, Q5_K and Q6_K against ggml and gguf-py."""

from __future__ import annotations

import pytest
import torch

from moequant.formats.base import Effort, Format
from moequant.formats.q2_k import Q2_K
from moequant.formats.q3_k import Q3_K
from moequant.formats.q4_k import Q4_K, Q5_K
from moequant.formats.q6_k import Q6_K
from tests.formats.checks import (
    casualties,
    decodes_like_others,
    loss,
    random_bytes,
    ratio_to_ggml,
    weights,
)

FORMATS = pytest.mark.parametrize("fmt", [Q2_K, Q3_K, Q4_K, Q5_K, Q6_K], ids=lambda f: f.name)
EFFORTS = pytest.mark.parametrize("effort", ["fast", "default", "best"])


@FORMATS
def test_decoder_is_ggml_bit_for_bit(fmt: Format) -> None:
    assert decodes_like_others(fmt, random_bytes(fmt))
    x = weights("heavy").reshape(-1, fmt.block)
    assert decodes_like_others(fmt, fmt.encode(x, x.abs() + 0.01, "fast"))


@FORMATS
@pytest.mark.parametrize("importance", ["flat", "mild", "spiky"])
@pytest.mark.parametrize("kind", ["gauss", "heavy"])
def test_error_is_below_ggml(fmt: Format, kind: str, importance: str) -> None:
    assert ratio_to_ggml(fmt, kind, importance) < 1.0


@FORMATS
def test_more_effort_loses_less(fmt: Format) -> None:
    x = weights("gauss").reshape(-1, fmt.block)
    w = x.abs() + 0.01
    lost = [loss(w, x, fmt.decode(fmt.encode(x, w, e))) for e in ("fast", "default", "best")]
    assert lost[2] < lost[1] < lost[0]


@FORMATS
@EFFORTS
def test_survives_nasty_blocks(fmt: Format, effort: Effort) -> None:
    assert casualties(fmt, effort) == []


@FORMATS
def test_constants_survive(fmt: Format) -> None:
    values = torch.tensor([0.37, -0.37, 65504.0, -65504.0, 1e-3])
    x = values[:, None].expand(-1, fmt.block).contiguous()
    q = fmt.decode(fmt.encode(x, torch.ones_like(x), "default"))
    torch.testing.assert_close(q, x, rtol=2**-8, atol=0)  # f16 keeps 8 bits of a scale of 1e-3 / 127


@FORMATS
def test_an_outlier_costs_its_own_sub_block_only(fmt: Format) -> None:
    x = weights("gauss", rows=8, columns=fmt.block)
    w = torch.ones_like(x)
    spoilt = x.clone()
    spoilt[:, 3] = 1.0  # fifty times the rest
    rest = slice(32, None)
    clean = loss(w[:, rest], x[:, rest], fmt.decode(fmt.encode(x, w, "default"))[:, rest])
    beside = loss(w[:, rest], x[:, rest], fmt.decode(fmt.encode(spoilt, w, "default"))[:, rest])
    power = float(x[:, rest].double().square().sum())
    assert clean < beside < power
