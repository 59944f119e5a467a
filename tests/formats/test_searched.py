"""Formats of grids, four-bit floats and three levels against ggml and gguf-py: the same promises for all."""

from __future__ import annotations

import pytest

from moequant.formats.base import Effort, Format
from moequant.formats.fp4 import MXFP4, NVFP4
from moequant.formats.iq1 import IQ1_M, IQ1_S
from moequant.formats.iq2 import IQ2_S, IQ2_XS, IQ2_XXS
from moequant.formats.iq3 import IQ3_S, IQ3_XXS
from moequant.formats.ternary import TQ1_0, TQ2_0
from tests.formats.checks import casualties, decodes_like_others, random_bytes, ratio_to_ggml, weights

ALL = [IQ1_M, IQ1_S, IQ2_S, IQ2_XS, IQ2_XXS, IQ3_S, IQ3_XXS, MXFP4, NVFP4, TQ1_0, TQ2_0]
FORMATS = pytest.mark.parametrize("fmt", ALL, ids=lambda f: f.name)


@FORMATS
def test_decoder_is_ggml_bit_for_bit(fmt: Format) -> None:
    assert decodes_like_others(fmt, random_bytes(fmt))
    x = weights("heavy").reshape(-1, fmt.block)
    assert decodes_like_others(fmt, fmt.encode(x, x.abs() + 0.01, "fast"))


@FORMATS
@pytest.mark.parametrize(("kind", "importance"), [("gauss", "mild"), ("heavy", "flat")])
def test_error_is_below_ggml(fmt: Format, kind: str, importance: str) -> None:
    assert ratio_to_ggml(fmt, kind, importance) <= 0.97


@FORMATS
def test_more_effort_never_loses(fmt: Format) -> None:
    fast, default, best = (ratio_to_ggml(fmt, "gauss", "spiky", e) for e in ("fast", "default", "best"))
    # In IQ1, scales that suit a sub-block better may suit the d they share a little worse.
    assert best <= default <= fast * (1.005 if fmt in (IQ1_M, IQ1_S) else 1)
    assert default <= 0.97, "as for other weights and importances"


@FORMATS
@pytest.mark.parametrize("effort", ["fast", "default", "best"])
def test_nasty_blocks(fmt: Format, effort: Effort) -> None:
    assert casualties(fmt, effort) == []
