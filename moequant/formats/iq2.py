"""IQ2_S, IQ2_XS and IQ2_XXS: 2-bit weights from grids of eight values, with separate signs.

Values are 8, 25 and 43; a weight is ± d · (2 l + 1) / 8 · row value, l of 4 bits.

IQ2_S, 256 weights in 82 bytes: f16 d; 32 low bytes of row numbers in a grid of 1024; 32 bytes
of signs; 8 bytes of 2-bit high parts; 8 bytes of two l, one for each 16 weights.

IQ2_XS, 256 weights in 74 bytes: f16 d; 32 u16 of a row number (9 bits, grid of 512) and 7 signs
(the eighth makes their number even); 8 bytes of two l, one for each 16 weights.

IQ2_XXS, 256 weights in 66 bytes: f16 d; for each 32 weights 4 row numbers (grid of 256) and a
u32 with 4 x 7 signs and l above.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moequant.formats.base import Effort, Format
from moequant.formats.codebook import Ladder, u16_bytes, u16_from
from moequant.formats.grids import (
    Layout,
    search,
)
from moequant.formats.layout import half_at, half_bytes, join_nibbles, split_nibbles
from moequant.formats.parts import Vector, VectorParts
from moequant.formats.rows import Grid
from moequant.formats.signs import fill_parity, join_signs_and_scales, split_signs_and_scales

LADDER = Ladder(1, 31, 2)
LANDINGS = (1.12, 0.92, 1.48, 1.24, 0.7, 1.0)
LANDINGS_XXS = (1.24, 1.04, 1.56, 1.76, 1.4, 0.8)
GRID_S, GRID_XS, GRID_XXS = (
    Grid(name, group=8, bits=2, highest=2, low=8, step=17, extra=1) for name in ("IQ2_S", "IQ2_XS", "IQ2_XXS")
)
LAYOUT_S = Layout(GRID_S, sub=16, unit=0.125, ladder=LADDER, landings=LANDINGS)
LAYOUT_XS = Layout(GRID_XS, sub=16, unit=0.125, ladder=LADDER, landings=LANDINGS, even=True)
LAYOUT_XXS = Layout(GRID_XXS, sub=32, unit=0.125, ladder=LADDER, landings=LANDINGS_XXS, even=True)


def pack_s(parts: VectorParts) -> Tensor:
    """IQ2_S: -> uint8 [n, 82]."""
    two = torch.arange(0, 8, 2, device=parts.row.device)
    high = ((parts.row >> 8).view(-1, 8, 4) << two).sum(-1).to(torch.uint8)
    low = (parts.row & 255).to(torch.uint8)
    return torch.cat([half_bytes(parts.d), low, parts.signs, high, join_nibbles(parts.scale, 1)], 1)


def unpack_s(packed: Tensor) -> VectorParts:
    """IQ2_S: uint8 [n, 82] -> its fields."""
    two = torch.arange(0, 8, 2, device=packed.device).to(torch.uint8)
    high = (packed[:, 66:74, None] >> two & 3).flatten(1)
    row = packed[:, 2:34].to(torch.int32) | high.to(torch.int32) << 8
    scale = split_nibbles(packed[:, 74:82], 1)
    return VectorParts(row, packed[:, 34:66], packed[:, :0], scale, half_at(packed, 0))


def pack_xs(parts: VectorParts) -> Tensor:
    """IQ2_XS: -> uint8 [n, 74]."""
    code = u16_bytes(parts.row | (parts.signs.to(torch.int32) & 127) << 9)
    return torch.cat([half_bytes(parts.d), code, join_nibbles(parts.scale, 1)], 1)


def unpack_xs(packed: Tensor) -> VectorParts:
    """IQ2_XS: uint8 [n, 74] -> its fields."""
    code = u16_from(packed[:, 2:66])
    scale = split_nibbles(packed[:, 66:74], 1)
    return VectorParts(code & 511, fill_parity(code >> 9), packed[:, :0], scale, half_at(packed, 0))


def pack_xxs(parts: VectorParts) -> Tensor:
    """IQ2_XXS: -> uint8 [n, 66]."""
    row = parts.row.to(torch.uint8).view(-1, 8, 4)
    code = torch.cat([row, join_signs_and_scales(parts.signs, parts.scale).view(-1, 8, 4)], 2)
    return torch.cat([half_bytes(parts.d), code.flatten(1)], 1)


def unpack_xxs(packed: Tensor) -> VectorParts:
    """IQ2_XXS: uint8 [n, 66] -> its fields."""
    code = packed[:, 2:].reshape(-1, 8, 8)
    signs, scale = split_signs_and_scales(code[:, :, 4:].reshape(-1, 32))
    row = code[:, :, :4].to(torch.int32).flatten(1)
    return VectorParts(row, signs, packed[:, :0], scale, half_at(packed, 0))


def encode_s(x: Tensor, w: Tensor, effort: Effort) -> Tensor:
    """IQ2_S: x, w [n, 256] -> uint8 [n, 82]."""
    return pack_s(search(LAYOUT_S, x, w, effort).parts())


def encode_xs(x: Tensor, w: Tensor, effort: Effort) -> Tensor:
    """IQ2_XS: x, w [n, 256] -> uint8 [n, 74]."""
    return pack_xs(search(LAYOUT_XS, x, w, effort).parts())


def encode_xxs(x: Tensor, w: Tensor, effort: Effort) -> Tensor:
    """IQ2_XXS: x, w [n, 256] -> uint8 [n, 66]."""
    return pack_xxs(search(LAYOUT_XXS, x, w, effort).parts())


VIEW_S = Vector(LAYOUT_S, unpack_s, pack_s)
VIEW_XS = Vector(LAYOUT_XS, unpack_xs, pack_xs)
VIEW_XXS = Vector(LAYOUT_XXS, unpack_xxs, pack_xxs)
IQ2_S = Format("IQ2_S", 22, 256, 82, encode_s, VIEW_S.decode, 1.0, gain=1.03, view=VIEW_S, loops=True)
IQ2_XS = Format("IQ2_XS", 17, 256, 74, encode_xs, VIEW_XS.decode, 1.0, gain=1.05, view=VIEW_XS, loops=True)
IQ2_XXS = Format(
    "IQ2_XXS", 16, 256, 66, encode_xxs, VIEW_XXS.decode, 1.0, gain=1.06, view=VIEW_XXS, loops=True
)
