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
from moequant.formats.grids import Grid, Layout, points, read_signs_and_scales, search, sign_values
from moequant.formats.layout import half_bytes, read_half

LADDER = Ladder(1, 31, 2)
LANDINGS = (1.04, 0.9, 1.14, 0.78, 0.98, 1.28)
GRID_S = Grid("IQ3_S", group=4, bits=3, highest=7, low=1, step=2)
GRID_XXS = Grid("IQ3_XXS", group=4, bits=3, highest=7, low=4, step=8, extra=2)
LAYOUT_S = Layout(GRID_S, sub=32, unit=1.0, ladder=LADDER, landings=LANDINGS)
LAYOUT_XXS = Layout(GRID_XXS, sub=32, unit=0.25, ladder=LADDER, landings=LANDINGS, even=True)


def encode_s(x: Tensor, w: Tensor, effort: Effort) -> Tensor:
    """IQ3_S: x, w [n, 256] -> uint8 [n, 110]."""
    fit = search(LAYOUT_S, x, w, effort)
    row = fit.rows()  # [n, 64]
    high = (row >> 8).view(-1, 8, 8) << torch.arange(8, device=x.device)
    scale = fit.scales()
    return torch.cat(
        [
            half_bytes(fit.d),
            row.to(torch.uint8),
            high.sum(-1).to(torch.uint8),
            fit.sign_bytes().to(torch.uint8),
            (scale[:, ::2] | scale[:, 1::2] << 4).to(torch.uint8),
        ],
        1,
    )


def encode_xxs(x: Tensor, w: Tensor, effort: Effort) -> Tensor:
    """IQ3_XXS: x, w [n, 256] -> uint8 [n, 98]."""
    fit = search(LAYOUT_XXS, x, w, effort)
    return torch.cat([half_bytes(fit.d), fit.rows().to(torch.uint8), fit.signs_and_scales()], 1)


def decode_s(packed: Tensor) -> Tensor:
    """IQ3_S: uint8 [n, 110] -> f32 [n, 256]."""
    n = len(packed)
    eight = torch.arange(8, device=packed.device)
    high = packed[:, 66:74, None] >> eight.to(torch.uint8) & 1
    row = packed[:, 2:66].to(torch.int32) | high.view(n, 64).to(torch.int32) << 8
    scale = packed[:, 106 + eight // 2] >> (eight % 2 * 4).to(torch.uint8) & 15
    step = read_half(packed, 0) * (1 + 2 * scale.to(torch.float32))
    value = points("IQ3_S").to(packed.device)[row].view(n, 8, 32)
    return (step[:, :, None] * value * sign_values(packed[:, 74:106]).view(n, 8, 32)).view(n, 256)


def decode_xxs(packed: Tensor) -> Tensor:
    """IQ3_XXS: uint8 [n, 98] -> f32 [n, 256]."""
    n = len(packed)
    signs, scale = read_signs_and_scales(packed[:, 66:98])
    step = read_half(packed, 0) * (0.5 + scale) * 0.5
    value = points("IQ3_XXS").to(packed.device)[packed[:, 2:66].to(torch.int32)].view(n, 8, 32)
    return (step[:, :, None] * value * signs.view(n, 8, 32)).view(n, 256)


IQ3_S = Format("IQ3_S", 21, 256, 110, encode_s, decode_s, magnitude=1.0, gain=1.01)
IQ3_XXS = Format("IQ3_XXS", 18, 256, 98, encode_xxs, decode_xxs, magnitude=1.0, gain=1.015)
