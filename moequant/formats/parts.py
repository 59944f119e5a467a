"""What the bytes of a block say, field by field: the one place where codes, scales and values meet.

A `Scalar` format stores a code for every weight, a `Vector` format a row of a grid for every four or
eight. `unpack` and `pack` are a format's layout; what the fields mean is here, for decoders and for
whoever moves codes and scales about (`moequant.rounding`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moequant.formats.layout import half

if TYPE_CHECKING:
    from moequant.formats.grids import Layout


@dataclass(frozen=True, slots=True)
class Parts:
    """The fields of n blocks of a `Scalar` format.

    codes u8 [n, block], scale u8 [n, sub-blocks]; minimum u8 [n, sub-blocks] or [n, 0];
    d f16 [n, 1] (groups of integers: their scales' type); dmin f16 [n, 1] or [n, 0]. Codes are as stored:
    indices into the format's tables. `pack` takes d and dmin in f32 as well, and rounds them.
    """

    codes: Tensor
    scale: Tensor
    minimum: Tensor
    d: Tensor
    dmin: Tensor


@dataclass(frozen=True, slots=True)
class Scalar:
    """weight = d · scales[scale] · levels[code] - dmin · minima[minimum].

    A table of one entry belongs to a field that is not stored, and with `stores_d` False neither is d,
    which is 1. `minima` is empty where there is no minimum. `codes` and `scale_codes` are what an encoder
    may write (some codes mean something only to a decoder); scales ascend over `scale_codes`. `storable`
    rounds d and dmin, f32, to what a block can hold. `snap` is the nearest level and `code_of` the code of a
    level, f32 to f32 and to u8, where levels are no integers.
    """

    sub: int
    levels: tuple[float, ...]
    unpack: Callable[[Tensor], Parts]
    pack: Callable[[Parts], Tensor]
    codes: range
    scales: tuple[float, ...] = (1.0,)
    scale_codes: range = range(1)
    minima: tuple[float, ...] = ()
    stores_d: bool = True
    storable: Callable[[Tensor], Tensor] = half
    snap: Callable[[Tensor], Tensor] | None = None
    code_of: Callable[[Tensor], Tensor] | None = None

    def decode(self, packed: Tensor) -> Tensor:
        """uint8 [n, block_bytes] -> f32 [n, block]."""
        return self.value(self.unpack(packed))

    def value(self, parts: Parts) -> Tensor:
        """The weights, f32 [n, block], rounded as ggml rounds them."""
        step = parts.d.float() * look_up(self.scales, parts.scale)
        value = step[..., None] * look_up(self.levels, parts.codes).view(len(step), -1, self.sub)
        if self.minima:
            value = value - (parts.dmin.float() * look_up(self.minima, parts.minimum))[..., None]
        return value.flatten(1)


@dataclass(frozen=True, slots=True)
class VectorParts:
    """The fields of n blocks of a `Vector` format, 256 weights each.

    row i32 [n, groups]; signs u8 [n, 32], bit i of a byte set where weight i of eight is negative, or
    [n, 0]; down u8 [n, groups], 1 where a row is shifted down; scale u8 [n, sub-blocks]; d f16 [n, 1].
    """

    row: Tensor
    signs: Tensor
    down: Tensor
    scale: Tensor
    d: Tensor


@dataclass(frozen=True, slots=True)
class Vector:
    """weight = d · unit · (2 · scale + 1) · (value of the row ± delta), negated where its sign is set."""

    layout: Layout
    unpack: Callable[[Tensor], VectorParts]
    pack: Callable[[VectorParts], Tensor]

    def decode(self, packed: Tensor) -> Tensor:
        """uint8 [n, block_bytes] -> f32 [n, 256]."""
        return self.value(self.unpack(packed))

    def value(self, parts: VectorParts) -> Tensor:
        """The weights, f32 [n, 256], rounded as ggml rounds them."""
        step = parts.d.float() * self.layout.unit * (2 * parts.scale.float() + 1)
        return (step[..., None] * self.points(parts).view(len(step), -1, self.layout.sub)).flatten(1)

    def points(self, parts: VectorParts) -> Tensor:
        """What the scales multiply, f32 [n, 256]."""
        from moequant.formats.rows import points
        from moequant.formats.signs import sign_values

        grid = self.layout.grid
        value = points(grid.name).to(parts.row.device)[parts.row]
        if grid.delta:
            value = value + torch.where(parts.down > 0, -grid.delta, grid.delta).float()[..., None]
        value = value.flatten(1)
        return value if self.layout.signed else value * sign_values(parts.signs)


def look_up(table: tuple[float, ...], codes: Tensor) -> Tensor:
    """f32: table[codes], by arithmetic where the table counts up by one."""
    if len(table) == 1:
        return torch.full_like(codes, table[0], dtype=torch.float32)
    if _counts_up(table):
        return codes.to(torch.float32) + table[0]
    return torch.take(torch.tensor(table, dtype=torch.float32, device=codes.device), codes.to(torch.int64))


def count_up(lowest: int, highest: int) -> tuple[float, ...]:
    """lowest, lowest + 1, … highest."""
    return tuple(float(i) for i in range(lowest, highest + 1))


@cache
def _counts_up(table: tuple[float, ...]) -> bool:
    return table == tuple(table[0] + i for i in range(len(table)))
