"""Q3_K: 16 sub-blocks of 16, each with a signed 6-bit scale.

    weight = d · (scale - 32) · (code - 4)

| bytes | holds |
|---|---|
| 32 | bit 2 of the codes; byte l has those of weights l, l + 32, …, lowest bit first |
| 64 | low 2 bits; of each 128, weights l, l + 32, l + 64 and l + 96 share a byte, lowest bits first |
| 12 | scales: 8 bytes of low nibbles (j, j + 8), 4 bytes of high 2 bits (j, j + 4, j + 8, j + 12) |
| 2 | d, f16 |
"""

from __future__ import annotations

import torch
from torch import Tensor

from moequant.formats.base import Effort, Format
from moequant.formats.layout import half_bytes, read_half
from moequant.formats.symmetric import Symmetric, search

_Q3 = Symmetric(sub=16, low=-4, high=3, low_scale=-32, high_scale=31)


def _encode(x: Tensor, w: Tensor, effort: Effort) -> Tensor:
    fit = search(_Q3, x, w, effort)
    scale = (fit.scale + 32).to(torch.uint8)
    low = scale[:, :8] & 15 | (scale[:, 8:] & 15) << 4
    p, q, r, s = (scale >> 4).view(-1, 4, 4).unbind(1)
    bit = torch.arange(8, dtype=torch.uint8, device=x.device)[:, None]
    codes = (fit.codes + 4).to(torch.uint8)
    top = ((codes.view(-1, 8, 32) >> 2) << bit).sum(1, dtype=torch.uint8)
    a, b, c, d = (codes & 3).view(-1, 2, 4, 32).unbind(2)
    rest = (a | b << 2 | c << 4 | d << 6).view(-1, 64)
    return torch.cat([top, rest, low, p | q << 2 | r << 4 | s << 6, half_bytes(fit.d)], 1)


def _decode(packed: Tensor) -> Tensor:
    bit = torch.arange(8, dtype=torch.uint8, device=packed.device)[:, None]
    pair = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=packed.device)[:, None]
    top = (packed[:, None, :32] >> bit & 1).view(-1, 256)
    low = (packed[:, 32:96].reshape(-1, 2, 1, 32) >> pair & 3).view(-1, 256)
    codes = (low | top << 2).to(torch.int8) - 4
    nibbles = torch.cat([packed[:, 96:104] & 15, packed[:, 96:104] >> 4], 1)
    scale = (nibbles | (packed[:, None, 104:108] >> pair & 3).view(-1, 16) << 4).to(torch.int8) - 32
    return ((read_half(packed, 108) * scale)[..., None] * codes.view(-1, 16, 16)).view(-1, 256)


Q3_K = Format("Q3_K", 11, 256, 110, _encode, _decode, magnitude=1.0, tiles=4)
