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
from moequant.formats.layout import half_at, half_bytes, join_pairs, join_planes, split_pairs, split_planes
from moequant.formats.parts import Parts, Scalar, count_up
from moequant.formats.symmetric import Symmetric, search

_Q3 = Symmetric(sub=16, low=-4, high=3, low_scale=-32, high_scale=31)


def _pack(parts: Parts) -> Tensor:
    codes, scale = parts.codes, parts.scale
    low = scale[:, :8] & 15 | (scale[:, 8:] & 15) << 4
    p, q, r, s = (scale >> 4).view(-1, 4, 4).unbind(1)
    high = p | q << 2 | r << 4 | s << 6
    return torch.cat([join_planes(codes >> 2), join_pairs(codes & 3), low, high, half_bytes(parts.d)], 1)


def _unpack(packed: Tensor) -> Parts:
    pair = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=packed.device)[:, None]
    codes = split_pairs(packed[:, 32:96]) | split_planes(packed[:, :32]) << 2
    nibbles = torch.cat([packed[:, 96:104] & 15, packed[:, 96:104] >> 4], 1)
    scale = nibbles | (packed[:, None, 104:108] >> pair & 3).view(-1, 16) << 4
    d = half_at(packed, 108)
    return Parts(codes, scale, scale[:, :0], d, d[:, :0])


def _encode(x: Tensor, w: Tensor, effort: Effort) -> Tensor:
    return _pack(search(_Q3, x, w, effort).parts(_Q3))


VIEW = Scalar(
    sub=16,
    levels=count_up(-4, 3),
    unpack=_unpack,
    pack=_pack,
    codes=range(8),
    scales=count_up(-32, 31),
    scale_codes=range(64),
)
Q3_K = Format("Q3_K", 11, 256, 110, _encode, VIEW.decode, magnitude=1.0, tiles=4, view=VIEW, loops=True)
