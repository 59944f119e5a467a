"""MXFP4: FP4 codes (e2m1), a power of two for each 32 along `in`.

| shipped as | codes | scales |
|---|---|---|
| gpt-oss | `*_blocks` U8 [E, out, in / 32, 16] | `*_scales` U8 [E, out, in / 32] |
| compressed-tensors | `weight_packed` U8 [out, in / 2] | `weight_scale` U8 [out, in / 32] |
| DeepSeek-V4, MiMo | `weight` I8 or U8 [out, in / 2] | `.scale` or `weight_scale` E8M0 or U8 |

The low nibble of a byte is the even weight; scale byte s is 2^(s - 127). References: transformers 5.23
`integrations/mxfp4.py`, compressed-tensors 0.20 `mxfp4`, the OCP Microscaling Formats specification 1.0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moequant.checkpoint.codecs.base import read_part
from moequant.checkpoint.codecs.bits import e2m1
from moequant.checkpoint.codecs.eight_bit import finite
from moequant.checkpoint.codecs.scales import Grid, scaled
from moequant.values import Stored

BLOCK = 32
_GRID = Grid(1, BLOCK)


@dataclass(frozen=True, slots=True)
class Mxfp4:
    """Parts `weight` U8 [.., out, in / 2] and `scale` F8_E8M0 [.., out, in / 32].

    BF16, exact: a code has two bits, and bf16 the exponents of all scales; so the product is taken in it.
    """

    name: str = "mxfp4"

    def decode(self, stored: Stored, index: int | None, rows: range | None) -> Tensor:
        """See `Codec`. CheckpointError for a scale that is NaN (byte 255), or a product beyond bf16."""
        assert rows is not None
        scales = _GRID.read(stored.parts["scale"], index, rows).to(torch.bfloat16)
        values = e2m1(read_part(stored.parts["weight"], index, rows), torch.bfloat16)
        return finite(stored, scaled(values, scales, BLOCK))
