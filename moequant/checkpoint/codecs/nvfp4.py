"""NVFP4: FP4 codes (e2m1), an e4m3 scale for each 16 along `in`, and one number for the tensor.

| shipped by | codes | scales | one for all |
|---|---|---|---|
| ModelOpt | `weight` U8 [out, in / 2] | `weight_scale` [out, in / 16] | `weight_scale_2`, multiplies |
| compressed-tensors | `weight_packed` | `weight_scale` | `weight_global_scale`, divides |

The low nibble of a byte is the even weight. Stacks that the model multiplies as [in, out] (Llama 4, gpt-oss)
ModelOpt turns before it packs, and back again: `Nvfp4Across`. References: nvidia-modelopt 0.47
`NVFP4QTensor`, compressed-tensors 0.20 `nvfp4`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moequant.checkpoint.codecs.base import damaged, read_part
from moequant.checkpoint.codecs.bits import e2m1
from moequant.checkpoint.codecs.eight_bit import finite
from moequant.checkpoint.codecs.scales import numbers, scaled
from moequant.values import Stored, TensorRef

BLOCK = 16


@dataclass(frozen=True, slots=True)
class Nvfp4:
    """Parts `weight` U8 [.., out, in / 2], `scale` F8_E4M3 [.., out, in / 16] and `global_scale` [.., 1, 1].

    F32: code times scale is exact, the last step is rounded once.
    """

    divides: bool
    name: str = "nvfp4"

    def decode(self, stored: Stored, index: int | None, rows: range | None) -> Tensor:
        """See `Codec`. CheckpointError for a scale that is NaN or negative, or a product beyond f32."""
        assert rows is not None
        values = e2m1(read_part(stored.parts["weight"], index, rows))
        values = scaled(values, self.scales(stored, index, rows).to(torch.float32), BLOCK)
        factor = self._factor(stored, index)
        return finite(stored, values.div_(factor) if self.divides else values.mul_(factor))

    def scales(self, stored: Stored, index: int | None, rows: range) -> Tensor:
        """The e4m3 scales [len(rows), in / 16]. CheckpointError when one is NaN or has a sign."""
        ref = stored.parts["scale"]
        return _positive(ref, read_part(ref, index, rows))

    def multiplier(self, stored: Stored, index: int | None) -> Tensor:
        """f32 []: what the rest is multiplied by; where the file divides, its inverse, rounded."""
        factor = self._factor(stored, index)
        return 1 / factor if self.divides else factor

    def _factor(self, stored: Stored, index: int | None) -> Tensor:
        factor = _whole(stored, index)
        if self.divides and factor == 0:
            raise damaged(stored.parts["global_scale"].name, "is 0, a number to divide by was expected")
        return factor


@dataclass(frozen=True, slots=True)
class Nvfp4Across:
    """Parts `weight` U8 [E, in / 2, out], `scale` F8_E4M3 [E, in / 16, out] and `global_scale`, which
    multiplies; a weight's rows are `in`. F32 as in `Nvfp4`."""

    name: str = "nvfp4"

    def decode(self, stored: Stored, index: int | None, rows: range | None) -> Tensor:
        """See `Codec`. CheckpointError for a scale that is NaN or negative, or a product beyond f32."""
        assert rows is not None
        first, last = rows.start // BLOCK, -(-rows.stop // BLOCK)
        half = BLOCK // 2
        packed = read_part(stored.parts["weight"], index, range(first * half, last * half))
        ref = stored.parts["scale"]
        scales = _positive(ref, read_part(ref, index, range(first, last))).to(torch.float32)
        values = scaled(e2m1(packed.T.contiguous()), scales.T, BLOCK).mul_(_whole(stored, index))
        begin = rows.start - first * BLOCK
        return finite(stored, values[:, begin : begin + len(rows)].T.contiguous())


def _positive(ref: TensorRef, scales: Tensor) -> Tensor:
    """The e4m3 scales. CheckpointError when one is NaN or has a sign."""
    if bad := int((scales.view(torch.uint8) >= 0x7F).sum()):
        raise damaged(ref.name, f"{bad} of {scales.numel()} scales are NaN or negative, expected neither")
    return scales


def _whole(stored: Stored, index: int | None) -> Tensor:
    """f32 []: the number for all of a matrix."""
    ref = stored.parts["global_scale"]
    return numbers(ref, index if len(ref.shape) == 3 else None).reshape(())
