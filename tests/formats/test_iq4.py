"""IQ4_NL and IQ4_XS against ggml and gguf-py."""

from __future__ import annotations

import pytest

from moequant.formats.base import Effort, Format
from moequant.formats.iq4 import IQ4_NL, IQ4_XS
from tests.formats.checks import (
    decodes_like_others,
    nasty_blocks,
    random_bytes,
    ratio_to_ggml,
    survives,
    weights,
)

FORMATS = pytest.mark.parametrize("fmt", [IQ4_NL, IQ4_XS], ids=lambda f: f.name)


@FORMATS
def test_decoder_is_ggml_bit_for_bit(fmt: Format) -> None:
    assert decodes_like_others(fmt, random_bytes(fmt))
    x = weights("heavy").reshape(-1, fmt.block)
    assert decodes_like_others(fmt, fmt.encode(x, x.abs() + 0.01, "fast"))


# The optimum over every scale is 0.953 for IQ4_NL on Gaussian weights and mild importance: block by block,
# nothing below it exists.
@FORMATS
@pytest.mark.parametrize(
    ("kind", "importance", "limit"),
    [("gauss", "mild", 0.96), ("heavy", "mild", 0.98), ("gauss", "spiky", 0.93), ("heavy", "flat", 0.985)],
)
def test_error_is_below_ggml(fmt: Format, kind: str, importance: str, limit: float) -> None:
    assert ratio_to_ggml(fmt, kind, importance) <= limit


@FORMATS
def test_more_effort_never_loses(fmt: Format) -> None:
    fast, default, best = (ratio_to_ggml(fmt, "gauss", "mild", e) for e in ("fast", "default", "best"))
    assert best <= default <= fast


@FORMATS
@pytest.mark.parametrize("effort", ["fast", "default", "best"])
def test_nasty_blocks(fmt: Format, effort: Effort) -> None:
    bad = [name for name, (x, w) in nasty_blocks(fmt).items() if not survives(fmt, x, w, effort)]
    assert bad == []
