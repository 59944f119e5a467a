"""MXFP6 of compressed-tensors: FP6 codes (e2m3), a power of two for each 32 along `in`.

`weight_packed` U8 [out, in · 3 / 4]: six bits a code, the lowest first, four codes in three bytes.
`weight_scale` U8 [out, in / 32], as in MXFP4. Reference: compressed-tensors 0.20 `mxfp6`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from moequant.checkpoint.codecs.base import read_part
from moequant.checkpoint.codecs.bits import look_up, unpack
from moequant.checkpoint.codecs.eight_bit import finite
from moequant.checkpoint.codecs.scales import Grid, scaled
from moequant.values import Stored

BLOCK = 32
_GRID = Grid(1, BLOCK)


@dataclass(frozen=True, slots=True)
class Mxfp6:
    """Parts `weight` U8 [.., out, in · 3 / 4] and `scale` F8_E8M0 [.., out, in / 32].

    BF16, exact: a code has four bits, and bf16 the exponents of all scales; so the product is taken in it.
    """

    name: str = "mxfp6"

    def decode(self, stored: Stored, index: int | None, rows: range | None) -> Tensor:
        """See `Codec`. CheckpointError for a scale that is NaN (byte 255), or a product beyond bf16."""
        assert rows is not None
        words = read_part(stored.parts["weight"], index, rows).view(torch.int32)  # 32 codes are 6 words
        values = look_up(_numbers(), unpack(words, 6))
        scales = _GRID.read(stored.parts["scale"], index, rows).to(torch.bfloat16)
        return finite(stored, scaled(values.view(torch.bfloat16), scales, BLOCK))


@cache
def _numbers() -> Tensor:
    """The bits of bf16, i16 [64]: eighths to 7/8, then 1 to 15/8 times 1, 2 and 4; then their negatives."""
    code = torch.arange(32)
    exponent, eighths = code // 8, code % 8
    size = torch.where(exponent == 0, eighths, (8 + eighths) * 2.0 ** (exponent - 1)) / 8
    return torch.cat([size, -size]).to(torch.bfloat16).view(torch.int16)
