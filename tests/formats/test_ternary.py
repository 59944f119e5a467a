"""TQ2_0 and TQ1_0 against ggml and gguf-py."""

from __future__ import annotations

import pytest

from moequant.formats.base import Effort, Format
from moequant.formats.ternary import TQ1_0, TQ2_0
from tests.formats.checks import (
    decodes_like_others,
    nasty_blocks,
    random_bytes,
    ratio_to_ggml,
    survives,
    weights,
)

FORMATS = pytest.mark.parametrize("fmt", [TQ1_0, TQ2_0], ids=lambda f: f.name)


@FORMATS
def test_decoder_is_ggml_bit_for_bit(fmt: Format) -> None:
    assert decodes_like_others(fmt, random_bytes(fmt))
    x = weights("heavy").reshape(-1, fmt.block)
    assert decodes_like_others(fmt, fmt.encode(x, x.abs() + 0.01, "fast"))


@FORMATS
@pytest.mark.parametrize(
    ("kind", "importance"), [("gauss", "mild"), ("heavy", "mild"), ("gauss", "spiky"), ("heavy", "flat")]
)
def test_error_is_below_ggml(fmt: Format, kind: str, importance: str) -> None:
    assert ratio_to_ggml(fmt, kind, importance) <= 0.97


@FORMATS
def test_more_effort_never_loses(fmt: Format) -> None:
    fast, default, best = (ratio_to_ggml(fmt, "gauss", "spiky", e) for e in ("fast", "default", "best"))
    assert best <= default <= fast


@FORMATS
@pytest.mark.parametrize("effort", ["fast", "default", "best"])
def test_nasty_blocks(fmt: Format, effort: Effort) -> None:
    bad = [name for name, (x, w) in nasty_blocks(fmt).items() if not survives(fmt, x, w, effort)]
    assert bad == []
