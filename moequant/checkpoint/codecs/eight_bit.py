"""A byte for each weight and scales for blocks of them: FP8, INT8 and MXFP8.

    weight = (code - zero point) · scale of its block

| shipped as | weight | scales |
|---|---|---|
| DeepSeek's FP8, and those like it | F8_E4M3 [out, in] | `weight_scale_inv` for 128 x 128; it multiplies |
| DeepSeek-V4 | F8_E4M3 | `.scale`, E8M0, for 128 x 128 |
| Mistral | F8_E4M3 | `qscale_weight`, one number |
| compressed-tensors, ModelOpt | F8_E4M3 or I8 | `weight_scale`: tensor, channel, group or block |
| MXFP8 | F8_E4M3 | E8M0 for 32 along `in` |

Fused experts are [E, out, in] with scales [E, …]. References: DeepSeek-V3's
`fp8_cast_bf16.py`, compressed-tensors 0.20 `naive_quantized`, transformers 5.23 `finegrained_fp8`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moequant.checkpoint.codecs.base import damaged, read_part
from moequant.checkpoint.codecs.bits import floats
from moequant.checkpoint.codecs.integers import Integers
from moequant.checkpoint.codecs.scales import Grid, scaled, spread
from moequant.values import Stored


@dataclass(frozen=True, slots=True)
class EightBit:
    """Parts `weight` [.., out, in], `scale` in `scales.as_grid`'s form and perhaps `zero_point` like it.

    One product in f32, rounded once. BF16 when scales are powers of two (E8M0): codes have at most
    7 bits beside the sign, so that nothing is rounded (down to bf16's smallest step, 2^-133); else F32.
    """

    name: str
    grid: Grid

    def decode(self, stored: Stored, index: int | None, rows: range | None) -> Tensor:
        """See `Codec`. CheckpointError for a code or scale that is no number, or a product beyond f32."""
        assert rows is not None
        codes = read_part(stored.parts["weight"], index, rows)
        values = codes.to(torch.float32) if codes.dtype == torch.int8 else floats(codes)
        if "zero_point" in stored.parts:
            zero = self.grid.read(stored.parts["zero_point"], index, rows)
            values -= spread(zero, self.grid.columns, values.shape[1])
        values = scaled(values, self.grid.read(stored.parts["scale"], index, rows), self.grid.columns)
        return finite(stored, values).to(torch.bfloat16 if stored.dtype == "BF16" else torch.float32)

    def integers(self, stored: Stored, index: int | None, rows: range) -> Integers | None:
        """The same as whole numbers and scales; None when codes are floats."""
        if stored.parts["weight"].dtype != "I8":
            return None
        codes = read_part(stored.parts["weight"], index, rows).to(torch.int16)
        if "zero_point" in stored.parts:
            zero = self.grid.read(stored.parts["zero_point"], index, rows).to(torch.int16)
            codes -= spread(zero, self.grid.columns, codes.shape[1])
        return Integers(codes, self.grid.read(stored.parts["scale"], index, rows), self.grid.columns)


def finite(stored: Stored, values: Tensor) -> Tensor:
    """The values, when all are numbers: scales are known to be, so that codes must have been none."""
    # A sum is finite only if its terms are, and takes a thirtieth of the time.
    if torch.isfinite(values.sum()) or not (bad := int((~torch.isfinite(values)).sum())):
        return values
    raise damaged(
        stored.name, f"{bad} of {values.numel()} values read are NaN or beyond f32, numbers were expected"
    )
