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
from moequant.formats.layout import (
    half_at,
    half_bytes,
    join_nibbles,
    join_planes,
    split_nibbles,
    split_planes,
)
from moequant.formats.parts import Parts, Scalar, count_up

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


def _header(parts: Parts) -> list[Tensor]:
    return [half_bytes(parts.d), half_bytes(parts.dmin), _pack_scales(parts.scale, parts.minimum)]


def _parts(packed: Tensor, codes: Tensor) -> Parts:
    """The header of the block with those codes."""
    scale, minimum = _unpack_scales(packed[:, 4:16].contiguous())
    return Parts(codes, scale, minimum, half_at(packed, 0), half_at(packed, 2))


def _pack_q4(parts: Parts) -> Tensor:
    return torch.cat([*_header(parts), join_nibbles(parts.codes, 32)], 1)


def _pack_q5(parts: Parts) -> Tensor:
    high = join_planes(parts.codes >> 4)
    return torch.cat([*_header(parts), high, join_nibbles(parts.codes & 15, 32)], 1)


def _unpack_q4(packed: Tensor) -> Parts:
    return _parts(packed, split_nibbles(packed[:, 16:], 32))


def _unpack_q5(packed: Tensor) -> Parts:
    return _parts(packed, split_nibbles(packed[:, 48:], 32) | split_planes(packed[:, 16:48]) << 4)


def _encode_q4(x: Tensor, w: Tensor, effort: Effort) -> Tensor:
    return _pack_q4(search(_Q4, x, w, effort).parts())


def _encode_q5(x: Tensor, w: Tensor, effort: Effort) -> Tensor:
    return _pack_q5(search(_Q5, x, w, effort).parts())


_SIX = count_up(0, 63)  # scales and minima
VIEW_Q4 = Scalar(32, count_up(0, 15), _unpack_q4, _pack_q4, range(16), _SIX, range(64), _SIX)
VIEW_Q5 = Scalar(32, count_up(0, 31), _unpack_q5, _pack_q5, range(32), _SIX, range(64), _SIX)
Q4_K = Format(
    "Q4_K", 12, 256, 144, _encode_q4, VIEW_Q4.decode, magnitude=1.0, tiles=4, view=VIEW_Q4, loops=True
)
Q5_K = Format(
    "Q5_K", 13, 256, 176, _encode_q5, VIEW_Q5.decode, magnitude=1.0, tiles=4, view=VIEW_Q5, loops=True
)
