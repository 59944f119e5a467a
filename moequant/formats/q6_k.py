"""Q6_K: 16 sub-blocks of 16, each with a signed 8-bit scale.

    weight = d · scale · (code - 32)

| bytes | holds |
|---|---|
| 128 | low 4 bits; of each 128 weights, l and l + 64 share byte l |
| 64 | high 2 bits; of each 128, weights l, l + 32, l + 64 and l + 96 share a byte, lowest bits first |
| 16 | scales, int8 |
| 2 | d, f16 |
"""

from __future__ import annotations

import torch
from torch import Tensor

from moequant.formats.base import Effort, Format
from moequant.formats.layout import half_bytes, join_nibbles, read_half, split_nibbles
from moequant.formats.symmetric import Symmetric, search

_Q6 = Symmetric(sub=16, low=-32, high=31, low_scale=-128, high_scale=127)


def _encode(x: Tensor, w: Tensor, effort: Effort) -> Tensor:
    fit = search(_Q6, x, w, effort)
    codes = (fit.codes + 32).to(torch.uint8)
    a, b, c, d = (codes >> 4).view(-1, 2, 4, 32).unbind(2)
    high = (a | b << 2 | c << 4 | d << 6).view(-1, 64)
    return torch.cat([join_nibbles(codes & 15, 64), high, fit.scale.view(torch.uint8), half_bytes(fit.d)], 1)


def _decode(packed: Tensor) -> Tensor:
    pair = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=packed.device)[:, None]
    high = (packed[:, 128:192].reshape(-1, 2, 1, 32) >> pair & 3).view(-1, 256)
    codes = (split_nibbles(packed[:, :128], 64) | high << 4).to(torch.int8) - 32
    scale = packed[:, 192:208].contiguous().view(torch.int8)
    return ((read_half(packed, 208) * scale)[..., None] * codes.view(-1, 16, 16)).view(-1, 256)


Q6_K = Format("Q6_K", 14, 256, 210, _encode, _decode, tiles=4)
