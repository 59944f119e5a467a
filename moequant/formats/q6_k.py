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
from moequant.formats.layout import half_at, half_bytes, join_nibbles, join_pairs, split_nibbles, split_pairs
from moequant.formats.parts import Parts, Scalar, count_up
from moequant.formats.symmetric import Symmetric, search

_Q6 = Symmetric(sub=16, low=-32, high=31, low_scale=-128, high_scale=127)


def _pack(parts: Parts) -> Tensor:
    low, high = join_nibbles(parts.codes & 15, 64), join_pairs(parts.codes >> 4)
    return torch.cat([low, high, parts.scale ^ 128, half_bytes(parts.d)], 1)


def _unpack(packed: Tensor) -> Parts:
    codes = split_nibbles(packed[:, :128], 64) | split_pairs(packed[:, 128:192]) << 4
    scale = packed[:, 192:208] ^ 128  # 0..255 for -128..127
    d = half_at(packed, 208)
    return Parts(codes, scale, scale[:, :0], d, d[:, :0])


def _encode(x: Tensor, w: Tensor, effort: Effort) -> Tensor:
    return _pack(search(_Q6, x, w, effort).parts(_Q6))


VIEW = Scalar(
    sub=16,
    levels=count_up(-32, 31),
    unpack=_unpack,
    pack=_pack,
    codes=range(64),
    scales=count_up(-128, 127),
    scale_codes=range(256),
)
Q6_K = Format("Q6_K", 14, 256, 210, _encode, VIEW.decode, tiles=4, view=VIEW, loops=True)
