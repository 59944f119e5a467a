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
from moequant.formats.layout import half_bytes, read_half

_Q2 = Affine(sub=16, top=3, top_scale=15, steps=17)


def _encode(x: Tensor, w: Tensor, effort: Effort) -> Tensor:
    fit = search(_Q2, x, w, effort)
    a, b, c, d = fit.codes.view(-1, 2, 4, 32).unbind(2)
    codes = (a | b << 2 | c << 4 | d << 6).view(-1, 64)
    return torch.cat([fit.scale | fit.minimum << 4, codes, half_bytes(fit.d), half_bytes(fit.dmin)], 1)


def _decode(packed: Tensor) -> Tensor:
    scales = packed[:, :16]
    s = (read_half(packed, 80) * (scales & 15))[..., None]
    m = (read_half(packed, 82) * (scales >> 4))[..., None]
    shift = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=packed.device)[:, None]
    codes = packed[:, 16:80].reshape(-1, 2, 1, 32) >> shift & 3
    return (s * codes.view(-1, 16, 16) - m).view(-1, 256)


# ggml takes mean(x²) of the block once here, twice in its other K types.
Q2_K = Format("Q2_K", 10, 256, 84, _encode, _decode, magnitude=1.0, spread=1.0, tiles=4)
