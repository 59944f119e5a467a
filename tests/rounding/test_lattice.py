"""Bytes to fields and back, in the layout that rounding works in."""

from __future__ import annotations

import pytest
import torch

from moequant.errors import FormatError
from moequant.formats import FORMATS, Format
from moequant.rounding.lattice import lattice_of
from tests.formats.checks import random_bytes, same_bits
from tests.rounding.data import BLOCK_FORMATS

EVERY = pytest.mark.parametrize("fmt", BLOCK_FORMATS, ids=lambda f: f.name)


def written(fmt: Format, blocks: int) -> torch.Tensor:
    """Bytes that the format's encoder writes, for weights of very different sizes."""
    g = torch.Generator().manual_seed(5)
    x = torch.randn(blocks, fmt.block, generator=g) * torch.exp(2 * torch.randn(blocks, 1, generator=g))
    return fmt.encode(x, torch.ones_like(x), "fast")


@EVERY
def test_fields_and_bytes_are_inverse(fmt: Format) -> None:
    lattice = lattice_of(fmt)
    packed = written(fmt, 24).view(2, 4, 3 * fmt.block_bytes)
    fields = lattice.read(packed)
    assert fields.level.shape == (2, 3 * fmt.block, 4)
    again = lattice.write(fields)
    assert torch.equal(again, packed) or fmt.name in ("MXFP4", "NVFP4")  # with two zeros
    assert torch.equal(fmt.decode(again.view(24, -1)), fmt.decode(packed.view(24, -1)))


@EVERY
def test_values_are_what_the_decoder_says(fmt: Format) -> None:
    packed = random_bytes(fmt, 24).view(2, 4, 3 * fmt.block_bytes)
    value = lattice_of(fmt).value(lattice_of(fmt).read(packed)).transpose(1, 2)
    assert same_bits(value.reshape(24, -1).contiguous(), fmt.decode(packed.view(24, -1)))


@EVERY
def test_a_block_is_a_view(fmt: Format) -> None:
    lattice = lattice_of(fmt)
    fields = lattice.read(written(fmt, 12).view(1, 4, 3 * fmt.block_bytes))
    middle = lattice.block_of(fields, fmt.block)
    expected = lattice.value(fields)[:, fmt.block : 2 * fmt.block]
    assert torch.equal(lattice.value(middle), expected)
    middle.d.mul_(2)
    assert torch.equal(fields.d[:, 1], middle.d[:, 0])


@pytest.mark.parametrize("fmt", [f for f in BLOCK_FORMATS if lattice_of(f).group == 1], ids=lambda f: f.name)
def test_snap_finds_the_nearest_level(fmt: Format) -> None:
    lattice = lattice_of(fmt)
    levels = torch.tensor(lattice.levels)
    span = float(levels[-1] - levels[0])
    t = torch.rand(2000, generator=torch.Generator().manual_seed(1)) * 1.4 * span + levels[0] - 0.2 * span
    near = lattice.snap(t.clone())
    assert set(near.tolist()) <= set(levels.tolist())
    torch.testing.assert_close((near - t).abs(), (levels - t[:, None]).abs().amin(1))


def test_plain_types_are_refused() -> None:
    with pytest.raises(FormatError, match="BF16 has no blocks"):
        lattice_of(FORMATS["BF16"])
