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
from moequant.formats.grids import Grid, Layout, points, search
from moequant.formats.layout import half_bytes, read_half

DELTA = 0.125
LADDER = Ladder(1, 15, 2)
GRID = Grid("IQ1_S", group=8, bits=2, highest=2, low=-1, step=1, delta=DELTA)
LANDINGS_S = (1.6, 2.16, 1.28, 3.12, 1.84, 1.04)
LANDINGS_M = (1.52, 1.04, 2.16, 1.28, 0.94, 1.72)
LAYOUT_S = Layout(GRID, sub=32, unit=1.0, ladder=LADDER, landings=LANDINGS_S, signed=True, one_delta=True)
LAYOUT_M = Layout(GRID, sub=16, unit=1.0, ladder=LADDER, landings=LANDINGS_M, signed=True)


def encode_s(x: Tensor, w: Tensor, effort: Effort) -> Tensor:
    """IQ1_S: x, w [n, 256] -> uint8 [n, 50]."""
    fit = search(LAYOUT_S, x, w, effort)
    row = fit.rows()
    high = ((row >> 8).view(-1, 8, 4) << torch.arange(0, 12, 3, device=x.device)).sum(-1)
    field = high | fit.scales() << 12 | fit.downs()[:, ::4] << 15
    return torch.cat([half_bytes(fit.d), row.to(torch.uint8), u16_bytes(field)], 1)


def encode_m(x: Tensor, w: Tensor, effort: Effort) -> Tensor:
    """IQ1_M: x, w [n, 256] -> uint8 [n, 56]."""
    fit = search(LAYOUT_M, x, w, effort)
    row = fit.rows()
    nibble = row >> 8 | fit.downs() << 3
    high = nibble[:, ::2] | nibble[:, 1::2] << 4
    scale = (fit.scales().view(-1, 4, 4) << torch.arange(0, 12, 3, device=x.device)).sum(-1)
    d = u16_from(half_bytes(fit.d)) >> torch.arange(0, 16, 4, device=x.device) & 15
    return torch.cat([row.to(torch.uint8), high.to(torch.uint8), u16_bytes(scale | d << 12)], 1)


def decode_s(packed: Tensor) -> Tensor:
    """IQ1_S: uint8 [n, 50] -> f32 [n, 256]."""
    field = u16_from(packed[:, 34:50])
    step = read_half(packed, 0) * (2 * (field >> 12 & 7) + 1)
    high = field[..., None] >> torch.arange(0, 12, 3, device=packed.device) & 7
    row = packed[:, 2:34].to(torch.int32) | high.flatten(1) << 8
    delta = torch.where(field >> 15 == 1, -DELTA, DELTA)
    value = points("IQ1_S").to(packed.device)[row].view(-1, 8, 32)
    return (step[:, :, None] * (value + delta[:, :, None])).flatten(1)


def decode_m(packed: Tensor) -> Tensor:
    """IQ1_M: uint8 [n, 56] -> f32 [n, 256]."""
    n = len(packed)
    field = u16_from(packed[:, 48:56])
    d = (field >> 12 << torch.arange(0, 16, 4, device=packed.device)).sum(1, keepdim=True)
    scale = field[..., None] >> torch.arange(0, 12, 3, device=packed.device) & 7
    step = read_half(u16_bytes(d), 0) * (2 * scale.view(n, 16) + 1)
    nibble = torch.stack([packed[:, 32:48] & 15, packed[:, 32:48] >> 4], -1).view(n, 32).to(torch.int32)
    row = packed[:, :32].to(torch.int32) | (nibble & 7) << 8
    value = points("IQ1_S").to(packed.device)[row] + torch.where(nibble > 7, -DELTA, DELTA)[..., None]
    return (step[:, :, None] * value.view(n, 16, 16)).flatten(1)


IQ1_S = Format("IQ1_S", 19, 256, 50, encode_s, decode_s, magnitude=1.0, gain=1.1)
IQ1_M = Format("IQ1_M", 29, 256, 56, encode_m, decode_m, magnitude=1.0, gain=1.09)
