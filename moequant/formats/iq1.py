"""IQ1_S and IQ1_M: about 1.6 and 1.75 bits, groups of eight weights from a grid of -1, 0 and 1.

A weight is d · (2 l + 1) · (row value ± 1/8), l of 3 bits, rows of a grid of 2048.

IQ1_S, 256 weights in 50 bytes: f16 d; 32 low bytes of row numbers; for each 32 weights a u16 with
4 x 3 high bits, l above them, and on top a bit that is 1 for -1/8.

IQ1_M, 256 weights in 56 bytes: 32 low bytes of row numbers; 16 bytes with a nibble for each group:
3 high bits and a bit that is 1 for -1/8; 4 u16 of four l each, one for each 16 weights, whose top
nibbles together are the f16 d, lowest first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moequant.formats.base import Effort, Format
from moequant.formats.codebook import Ladder, u16_bytes, u16_from
from moequant.formats.grids import Layout, search
from moequant.formats.layout import half_at, half_bytes, join_nibbles, split_nibbles
from moequant.formats.parts import Vector, VectorParts
from moequant.formats.rows import Grid

DELTA = 0.125
LADDER = Ladder(1, 15, 2)
GRID = Grid("IQ1_S", group=8, bits=2, highest=2, low=-1, step=1, delta=DELTA)
LANDINGS_S = (1.6, 2.16, 1.28, 3.12, 1.84, 1.04)
LANDINGS_M = (1.52, 1.04, 2.16, 1.28, 0.94, 1.72)
LAYOUT_S = Layout(GRID, sub=32, unit=1.0, ladder=LADDER, landings=LANDINGS_S, signed=True, one_delta=True)
LAYOUT_M = Layout(GRID, sub=16, unit=1.0, ladder=LADDER, landings=LANDINGS_M, signed=True)


def pack_s(parts: VectorParts) -> Tensor:
    """IQ1_S: -> uint8 [n, 50]; the shift of a sub-block is that of its first group."""
    three = torch.arange(0, 12, 3, device=parts.row.device)
    high = ((parts.row >> 8).view(-1, 8, 4) << three).sum(-1)
    field = high | parts.scale.to(torch.int32) << 12 | parts.down[:, ::4].to(torch.int32) << 15
    return torch.cat([half_bytes(parts.d), (parts.row & 255).to(torch.uint8), u16_bytes(field)], 1)


def unpack_s(packed: Tensor) -> VectorParts:
    """IQ1_S: uint8 [n, 50] -> its fields."""
    field = u16_from(packed[:, 34:50])
    high = field[..., None] >> torch.arange(0, 12, 3, device=packed.device) & 7
    row = packed[:, 2:34].to(torch.int32) | high.flatten(1).to(torch.int32) << 8
    down = (field >> 15).to(torch.uint8).repeat_interleave(4, 1)
    return VectorParts(row, packed[:, :0], down, (field >> 12 & 7).to(torch.uint8), half_at(packed, 0))


def pack_m(parts: VectorParts) -> Tensor:
    """IQ1_M: -> uint8 [n, 56]."""
    nibble = (parts.row >> 8).to(torch.uint8) | parts.down << 3
    three = torch.arange(0, 12, 3, device=parts.row.device)
    scale = (parts.scale.to(torch.int32).view(-1, 4, 4) << three).sum(-1)
    d = u16_from(half_bytes(parts.d)) >> torch.arange(0, 16, 4, device=parts.row.device) & 15
    row = (parts.row & 255).to(torch.uint8)
    return torch.cat([row, join_nibbles(nibble, 1), u16_bytes(scale | d << 12)], 1)


def unpack_m(packed: Tensor) -> VectorParts:
    """IQ1_M: uint8 [n, 56] -> its fields."""
    field = u16_from(packed[:, 48:56])
    d = (field >> 12 << torch.arange(0, 16, 4, device=packed.device)).sum(1, keepdim=True)
    scale = (field[..., None] >> torch.arange(0, 12, 3, device=packed.device) & 7).flatten(1)
    nibble = split_nibbles(packed[:, 32:48], 1)
    row = packed[:, :32].to(torch.int32) | (nibble & 7).to(torch.int32) << 8
    return VectorParts(row, packed[:, :0], nibble >> 3, scale.to(torch.uint8), half_at(u16_bytes(d), 0))


def encode_s(x: Tensor, w: Tensor, effort: Effort) -> Tensor:
    """IQ1_S: x, w [n, 256] -> uint8 [n, 50]."""
    return pack_s(search(LAYOUT_S, x, w, effort).parts())


def encode_m(x: Tensor, w: Tensor, effort: Effort) -> Tensor:
    """IQ1_M: x, w [n, 256] -> uint8 [n, 56]."""
    return pack_m(search(LAYOUT_M, x, w, effort).parts())


VIEW_S = Vector(LAYOUT_S, unpack_s, pack_s)
VIEW_M = Vector(LAYOUT_M, unpack_m, pack_m)
IQ1_S = Format("IQ1_S", 19, 256, 50, encode_s, VIEW_S.decode, 1.0, gain=1.1, view=VIEW_S, loops=True)
IQ1_M = Format("IQ1_M", 29, 256, 56, encode_m, VIEW_M.decode, 1.0, gain=1.09, view=VIEW_M, loops=True)
