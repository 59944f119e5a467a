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
    Grid,
    Layout,
    fill_parity,
    points,
    read_signs_and_scales,
    search,
    sign_values,
)
from moequant.formats.layout import half_bytes, read_half

LADDER = Ladder(1, 31, 2)
LANDINGS = (1.12, 0.92, 1.48, 1.24, 0.7, 1.0)
LANDINGS_XXS = (1.24, 1.04, 1.56, 1.76, 1.4, 0.8)
GRID_S, GRID_XS, GRID_XXS = (
    Grid(name, group=8, bits=2, highest=2, low=8, step=17, extra=1) for name in ("IQ2_S", "IQ2_XS", "IQ2_XXS")
)
LAYOUT_S = Layout(GRID_S, sub=16, unit=0.125, ladder=LADDER, landings=LANDINGS)
LAYOUT_XS = Layout(GRID_XS, sub=16, unit=0.125, ladder=LADDER, landings=LANDINGS, even=True)
LAYOUT_XXS = Layout(GRID_XXS, sub=32, unit=0.125, ladder=LADDER, landings=LANDINGS_XXS, even=True)


def encode_s(x: Tensor, w: Tensor, effort: Effort) -> Tensor:
    """IQ2_S: x, w [n, 256] -> uint8 [n, 82]."""
    fit = search(LAYOUT_S, x, w, effort)
    row = fit.rows()
    high = (row >> 8).view(-1, 8, 4) << torch.arange(0, 8, 2, device=x.device)
    parts = [half_bytes(fit.d), row & 255, fit.sign_bytes(), high.sum(-1), _pair(fit.scales())]
    return torch.cat([p.to(torch.uint8) for p in parts], 1)


def encode_xs(x: Tensor, w: Tensor, effort: Effort) -> Tensor:
    """IQ2_XS: x, w [n, 256] -> uint8 [n, 74]."""
    fit = search(LAYOUT_XS, x, w, effort)
    code = u16_bytes(fit.rows() | (fit.sign_bytes() & 127) << 9)
    return torch.cat([half_bytes(fit.d), code, _pair(fit.scales()).to(torch.uint8)], 1)


def encode_xxs(x: Tensor, w: Tensor, effort: Effort) -> Tensor:
    """IQ2_XXS: x, w [n, 256] -> uint8 [n, 66]."""
    fit = search(LAYOUT_XXS, x, w, effort)
    row = fit.rows().to(torch.uint8).view(-1, 8, 4)
    code = torch.cat([row, fit.signs_and_scales().view(-1, 8, 4)], 2)
    return torch.cat([half_bytes(fit.d), code.flatten(1)], 1)


def decode_s(packed: Tensor) -> Tensor:
    """IQ2_S: uint8 [n, 82] -> f32 [n, 256]."""
    two = torch.arange(0, 8, 2, device=packed.device).to(torch.uint8)
    high = (packed[:, 66:74, None] >> two & 3).flatten(1)
    row = packed[:, 2:34].to(torch.int32) | high.to(torch.int32) << 8
    value = points("IQ2_S").to(packed.device)[row].flatten(1)
    return _scale_sixteens(packed[:, :2], packed[:, 74:82], value, sign_values(packed[:, 34:66]))


def decode_xs(packed: Tensor) -> Tensor:
    """IQ2_XS: uint8 [n, 74] -> f32 [n, 256]."""
    code = u16_from(packed[:, 2:66])
    value = points("IQ2_XS").to(packed.device)[code & 511].flatten(1)
    return _scale_sixteens(packed[:, :2], packed[:, 66:74], value, sign_values(fill_parity(code >> 9)))


def decode_xxs(packed: Tensor) -> Tensor:
    """IQ2_XXS: uint8 [n, 66] -> f32 [n, 256]."""
    n = len(packed)
    code = packed[:, 2:].reshape(n, 8, 8)
    signs, scale = read_signs_and_scales(code[:, :, 4:].reshape(n, 32))
    step = read_half(packed, 0) * (0.5 + scale) * 0.25
    value = points("IQ2_XXS").to(packed.device)[code[:, :, :4].to(torch.int32)].view(n, 8, 32)
    return (step[:, :, None] * value * signs.view(n, 8, 32)).view(n, 256)


def _pair(scales: Tensor) -> Tensor:
    """int [n, 16] of 4 bits -> int [n, 8], the first of two in the low bits."""
    return scales[:, ::2] | scales[:, 1::2] << 4


def _scale_sixteens(d: Tensor, scales: Tensor, value: Tensor, signs: Tensor) -> Tensor:
    """f16 bytes [n, 2], scale bytes [n, 8], values and signs [n, 256] -> f32 [n, 256]."""
    n = len(d)
    scale = torch.stack([scales & 15, scales >> 4], -1).view(n, 16).to(torch.float32)
    step = read_half(d, 0) * (0.5 + scale) * 0.25
    return (step[:, :, None] * value.view(n, 16, 16) * signs.view(n, 16, 16)).view(n, 256)


IQ2_S = Format("IQ2_S", 22, 256, 82, encode_s, decode_s, magnitude=1.0, gain=1.03)
IQ2_XS = Format("IQ2_XS", 17, 256, 74, encode_xs, decode_xs, magnitude=1.0, gain=1.05)
IQ2_XXS = Format("IQ2_XXS", 16, 256, 66, encode_xxs, decode_xxs, magnitude=1.0, gain=1.06)
