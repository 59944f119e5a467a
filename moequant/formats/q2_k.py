"""Q2_K: 16 sub-blocks of 16, each with a 4-bit scale and a 4-bit minimum.

    weight = d · scale · code - dmin · min

| bytes | holds |
|---|---|
| 16 | scale (low nibble) and minimum (high nibble) of each sub-block |
| 64 | codes; of each 128, weights l, l + 32, l + 64 and l + 96 share a byte, lowest bits first |
| 2 | d, f16 |
| 2 | dmin, f16 |
"""

from __future__ import annotations

import torch
from torch import Tensor

from moequant.formats.affine import Affine, search
from moequant.formats.base import Effort, Format
from moequant.formats.layout import half_at, half_bytes, join_pairs, split_pairs
from moequant.formats.parts import Parts, Scalar, count_up

_Q2 = Affine(sub=16, top=3, top_scale=15, steps=17)


def _pack(parts: Parts) -> Tensor:
    header = parts.scale | parts.minimum << 4
    return torch.cat([header, join_pairs(parts.codes), half_bytes(parts.d), half_bytes(parts.dmin)], 1)


def _unpack(packed: Tensor) -> Parts:
    scales, codes = packed[:, :16], split_pairs(packed[:, 16:80])
    return Parts(codes, scales & 15, scales >> 4, half_at(packed, 80), half_at(packed, 82))


def _encode(x: Tensor, w: Tensor, effort: Effort) -> Tensor:
    return _pack(search(_Q2, x, w, effort).parts())


VIEW = Scalar(
    sub=16,
    levels=count_up(0, 3),
    unpack=_unpack,
    pack=_pack,
    codes=range(4),
    scales=count_up(0, 15),
    scale_codes=range(16),
    minima=count_up(0, 15),
)
# ggml takes mean(x²) of the block once here, twice in its other K types.
Q2_K = Format(
    "Q2_K", 10, 256, 84, _encode, VIEW.decode, magnitude=1.0, spread=1.0, tiles=4, view=VIEW, loops=True
)
