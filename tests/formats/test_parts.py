"""What the bytes say: unpacking and packing are inverse, and the fields mean what decoders say."""

from __future__ import annotations

import pytest
import torch

from moequant.formats import FORMATS
from moequant.formats.base import Format
from moequant.formats.parts import Scalar, Vector
from tests.formats.checks import decodes_like_others, random_bytes

VIEWED = pytest.mark.parametrize("fmt", [f for f in FORMATS.values() if f.view], ids=lambda f: f.name)


def test_every_block_format_has_a_view() -> None:
    assert {f.name for f in FORMATS.values() if f.view is None} == {"F32", "F16", "BF16"}


@VIEWED
def test_round_trip_is_exact_on_any_bytes(fmt: Format) -> None:
    packed = random_bytes(fmt)
    assert fmt.view is not None
    again = fmt.view.pack(fmt.view.unpack(packed))  # type: ignore[arg-type]
    assert again.dtype == torch.uint8
    if fmt.name != "TQ1_0":  # 256 bytes stand for 243 numbers
        assert torch.equal(again, packed)
    assert decodes_like_others(fmt, again)


@VIEWED
def test_shapes_and_types(fmt: Format) -> None:
    packed, view = random_bytes(fmt, 3), fmt.view
    if isinstance(view, Scalar):
        parts = view.unpack(packed)
        subs = fmt.block // view.sub
        assert parts.codes.shape == (3, fmt.block)
        assert parts.scale.shape == (3, subs)
        assert parts.minimum.shape == (3, subs if view.minima else 0)
        assert parts.dmin.shape == (3, 1 if view.minima else 0)
        assert {t.dtype for t in (parts.codes, parts.scale, parts.minimum)} == {torch.uint8}
    else:
        assert isinstance(view, Vector)
        grid, vector = view.layout.grid, view.unpack(packed)
        assert vector.row.shape == (3, 256 // grid.group)
        assert vector.signs.shape == (3, 0 if view.layout.signed else 32)
        assert vector.down.shape == (3, 32 if grid.delta else 0)
        assert vector.scale.shape == (3, 256 // view.layout.sub)
    assert view.unpack(packed).d.dtype == torch.float16


@VIEWED
def test_encoders_write_only_what_they_may(fmt: Format) -> None:
    if not isinstance(fmt.view, Scalar):
        pytest.skip("every row of a grid may be written")
    x = torch.randn(64, fmt.block, generator=torch.Generator().manual_seed(0))
    parts = fmt.view.unpack(fmt.encode(x, torch.ones_like(x), "default"))
    assert set(parts.codes.unique().tolist()) <= set(fmt.view.codes)
    assert set(parts.scale.unique().tolist()) <= set(fmt.view.scale_codes)
    scales = [fmt.view.scales[i] for i in fmt.view.scale_codes]
    assert scales == sorted(scales)
