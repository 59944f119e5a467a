"""Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 against ggml and gguf-py."""

from __future__ import annotations

import pytest
import torch

from moequant.formats.base import Effort, Format
from moequant.formats.legacy import Q4_0, Q4_1, Q5_0, Q5_1, Q8_0
from tests.formats.checks import (
    casualties,
    decodes_like_others,
    loss,
    random_bytes,
    ratio_to_ggml,
    weights,
)

ALL = [Q4_0, Q4_1, Q5_0, Q5_1, Q8_0]
FORMATS = pytest.mark.parametrize("fmt", ALL, ids=lambda f: f.name)
EFFORTS = pytest.mark.parametrize("effort", ["fast", "default", "best"])


@FORMATS
def test_decoder_is_ggml_bit_for_bit(fmt: Format) -> None:
    assert decodes_like_others(fmt, random_bytes(fmt))
    x = weights("heavy").reshape(-1, fmt.block)
    assert decodes_like_others(fmt, fmt.encode(x, x.abs() + 0.01, "fast"))


@FORMATS
@pytest.mark.parametrize("importance", ["flat", "mild", "spiky"])
@pytest.mark.parametrize("kind", ["gauss", "heavy"])
def test_error_is_not_above_ggml(fmt: Format, kind: str, importance: str) -> None:
    assert ratio_to_ggml(fmt, kind, importance) <= 1.0


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
