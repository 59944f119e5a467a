"""IQ3_S and IQ3_XXS: 3-bit weights from grids of four values, with separate signs.

IQ3_S, 256 weights in 110 bytes: f16 d; 64 low bytes and 64 high bits of the row numbers of
groups of four in a grid of 512; 32 bytes of signs; 4 bytes of eight 4-bit scales l. A weight
is ± d · (2 l + 1) · row value.

IQ3_XXS, 256 weights in 98 bytes: f16 d; 64 row numbers in a grid of 256; for each 32 weights a
u32 with 4 x 7 sign bits (the eighth makes their number even) and a 4-bit scale l above. A weight
is ± d · (2 l + 1) / 4 · row value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moequant.formats.base import Effort, Format
from moequant.formats.codebook import Ladder
from moequant.formats.grids import Layout, search
from moequant.formats.layout import half_at, half_bytes
from moequant.formats.parts import Vector, VectorParts
from moequant.formats.rows import Grid
from moequant.formats.signs import join_signs_and_scales, split_signs_and_scales

LADDER = Ladder(1, 31, 2)
LANDINGS = (1.04, 0.9, 1.14, 0.78, 0.98, 1.28)
GRID_S = Grid("IQ3_S", group=4, bits=3, highest=7, low=1, step=2)
GRID_XXS = Grid("IQ3_XXS", group=4, bits=3, highest=7, low=4, step=8, extra=2)
LAYOUT_S = Layout(GRID_S, sub=32, unit=1.0, ladder=LADDER, landings=LANDINGS)
LAYOUT_XXS = Layout(GRID_XXS, sub=32, unit=0.25, ladder=LADDER, landings=LANDINGS, even=True)


def pack_s(parts: VectorParts) -> Tensor:
    """IQ3_S: -> uint8 [n, 110]."""
    bit = torch.arange(8, dtype=torch.int32, device=parts.row.device)
    high = ((parts.row >> 8).view(-1, 8, 8) << bit).sum(-1)
    scale = parts.scale[:, ::2] | parts.scale[:, 1::2] << 4
    low = (parts.row & 255).to(torch.uint8)
    return torch.cat([half_bytes(parts.d), low, high.to(torch.uint8), parts.signs, scale], 1)


def unpack_s(packed: Tensor) -> VectorParts:
    """IQ3_S: uint8 [n, 110] -> its fields."""
    n = len(packed)
    eight = torch.arange(8, device=packed.device)
    high = packed[:, 66:74, None] >> eight.to(torch.uint8) & 1
    row = packed[:, 2:66].to(torch.int32) | high.view(n, 64).to(torch.int32) << 8
    scale = packed[:, 106 + eight // 2] >> (eight % 2 * 4).to(torch.uint8) & 15
    return VectorParts(row, packed[:, 74:106], packed[:, :0], scale, half_at(packed, 0))


def pack_xxs(parts: VectorParts) -> Tensor:
    """IQ3_XXS: -> uint8 [n, 98]."""
    code = join_signs_and_scales(parts.signs, parts.scale)
    return torch.cat([half_bytes(parts.d), parts.row.to(torch.uint8), code], 1)


def unpack_xxs(packed: Tensor) -> VectorParts:
    """IQ3_XXS: uint8 [n, 98] -> its fields."""
    signs, scale = split_signs_and_scales(packed[:, 66:98])
    return VectorParts(packed[:, 2:66].to(torch.int32), signs, packed[:, :0], scale, half_at(packed, 0))


def encode_s(x: Tensor, w: Tensor, effort: Effort) -> Tensor:
    """IQ3_S: x, w [n, 256] -> uint8 [n, 110]."""
    return pack_s(search(LAYOUT_S, x, w, effort).parts())


def encode_xxs(x: Tensor, w: Tensor, effort: Effort) -> Tensor:
    """IQ3_XXS: x, w [n, 256] -> uint8 [n, 98]."""
    return pack_xxs(search(LAYOUT_XXS, x, w, effort).parts())


VIEW_S = Vector(LAYOUT_S, unpack_s, pack_s)
VIEW_XXS = Vector(LAYOUT_XXS, unpack_xxs, pack_xxs)
IQ3_S = Format("IQ3_S", 21, 256, 110, encode_s, VIEW_S.decode, 1.0, gain=1.01, view=VIEW_S, loops=True)
IQ3_XXS = Format(
    "IQ3_XXS", 18, 256, 98, encode_xxs, VIEW_XXS.decode, 1.0, gain=1.015, view=VIEW_XXS, loops=True
)
