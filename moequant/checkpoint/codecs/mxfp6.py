"""MXFP6: FP6 codes, a power of two for each 32 along `in`.

`weight_packed`, of Quark `weight`, U8 [out, in · 3 / 4]: six bits a code, the lowest first, four codes in
three bytes. `weight_scale` U8 [out, in / 32], as in MXFP4. Codes of compressed-tensors are e2m3, those of
Quark e2m3 or e3m2. References: compressed-tensors 0.20 `mxfp6`, amd-quark 0.13 `Pack_fp6`.
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

    `exponent` is how many bits of a code are for the exponent. BF16, exact: a code has four bits beside its
    sign and exponent, and bf16 the exponents of all scales; so the product is taken in it.
    """

    exponent: int = 2
    name: str = "mxfp6"

    def decode(self, stored: Stored, index: int | None, rows: range | None) -> Tensor:
        """See `Codec`. CheckpointError for a scale that is NaN (byte 255), or a product beyond bf16."""
        assert rows is not None
        words = read_part(stored.parts["weight"], index, rows).view(torch.int32)  # 32 codes are 6 words
        values = look_up(_numbers(self.exponent), unpack(words, 6))
        scales = _GRID.read(stored.parts["scale"], index, rows).to(torch.bfloat16)
        return finite(stored, scaled(values.view(torch.bfloat16), scales, BLOCK))


@cache
def _numbers(bits: int) -> Tensor:
    """The bits of bf16, i16 [64], of codes with so many bits of exponent: fractions below the smallest power
    of two, then that and all above it; then their negatives."""
    steps, bias = 1 << 5 - bits, (1 << bits - 1) - 1
    exponent, fraction = torch.arange(32) // steps, torch.arange(32) % steps
    size = torch.where(exponent == 0, fraction * 2.0, (steps + fraction) * 2.0**exponent)
    size = size / (steps * 2.0**bias)
    return torch.cat([size, -size]).to(torch.bfloat16).view(torch.int16)
