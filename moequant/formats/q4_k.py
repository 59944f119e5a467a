"""Q4_K and Q5_K: 8 sub-blocks of 32, each with a 6-bit scale and a 6-bit minimum.

    weight = d · scale · code - dmin · min

| bytes | holds |
|---|---|
| 2 | d, f16 |
| 2 | dmin, f16 |
| 12 | 8 scales and 8 minima, 6 bits each |
| 0 or 32 | Q5_K: bit 4 of the codes; byte l has those of weights l, l + 32, … |
| 128 | low 4 bits of the codes; of each 64, the second 32 are in the high nibbles |
"""

from __future__ import annotations

import torch
from torch import Tensor

from moequant.formats.affine import Affine, search
from moequant.formats.base import Effort, Format
from moequant.formats.layout import half_bytes, join_nibbles, read_half, split_nibbles

_Q4 = Affine(sub=32, top=15, top_scale=63)
_Q5 = Affine(sub=32, top=31, top_scale=63)


def _pack_scales(scale: Tensor, minimum: Tensor) -> Tensor:
    """Two uint8 [n, 8] of 6-bit values -> uint8 [n, 12]."""
    return torch.cat(
        [
            scale[:, :4] | (scale[:, 4:] >> 4) << 6,
            minimum[:, :4] | (minimum[:, 4:] >> 4) << 6,
            (scale[:, 4:] & 15) | (minimum[:, 4:] & 15) << 4,
        ],
        1,
    )


def _unpack_scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 [n, 12] -> scales and minima, uint8 [n, 8] each."""
    a, b, c = packed.view(-1, 3, 4).unbind(1)
    scale = torch.cat([a & 63, (c & 15) | (a >> 6) << 4], 1)
    minimum = torch.cat([b & 63, c >> 4 | (b >> 6) << 4], 1)
    return scale, minimum


def _encode_q4(x: Tensor, w: Tensor, effort: Effort) -> Tensor:
    fit = search(_Q4, x, w, effort)
    header = [half_bytes(fit.d), half_bytes(fit.dmin), _pack_scales(fit.scale, fit.minimum)]
    return torch.cat([*header, join_nibbles(fit.codes, 32)], 1)


def _encode_q5(x: Tensor, w: Tensor, effort: Effort) -> Tensor:
    fit = search(_Q5, x, w, effort)
    header = [half_bytes(fit.d), half_bytes(fit.dmin), _pack_scales(fit.scale, fit.minimum)]
    bit = torch.arange(8, dtype=torch.uint8, device=x.device)[:, None]
    high = ((fit.codes.view(-1, 8, 32) >> 4) << bit).sum(1, dtype=torch.uint8)
    return torch.cat([*header, high, join_nibbles(fit.codes & 15, 32)], 1)


def _scaled(packed: Tensor, codes: Tensor) -> Tensor:
    """Apply the block's header to codes [n, 256] -> f32 [n, 256]."""
    scale, minimum = _unpack_scales(packed[:, 4:16].contiguous())
    s = (read_half(packed, 0) * scale)[..., None]
    m = (read_half(packed, 2) * minimum)[..., None]
    return (s * codes.view(-1, 8, 32) - m).view(-1, 256)


def _decode_q4(packed: Tensor) -> Tensor:
    return _scaled(packed, split_nibbles(packed[:, 16:], 32))


def _decode_q5(packed: Tensor) -> Tensor:
    bit = torch.arange(8, dtype=torch.uint8, device=packed.device)[:, None]
    high = (packed[:, None, 16:48] >> bit & 1).view(-1, 256)
    return _scaled(packed, split_nibbles(packed[:, 48:], 32) | high << 4)


Q4_K = Format("Q4_K", 12, 256, 144, _encode_q4, _decode_q4, magnitude=1.0, tiles=4)
Q5_K = Format("Q5_K", 13, 256, 176, _encode_q5, _decode_q5, magnitude=1.0, tiles=4)
