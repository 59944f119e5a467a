"""F32, F16 and BF16: one number a block, rounded to nearest even."""

from __future__ import annotations

import torch
from torch import Tensor

from moequant.formats.base import Effort, Format


def _format(name: str, ggml_type: int, dtype: torch.dtype, limit: float) -> Format:
    size = dtype.itemsize

    def encode(x: Tensor, w: Tensor, effort: Effort) -> Tensor:
        return x.to(dtype).view(torch.uint8).reshape(-1, size)

    def decode(packed: Tensor) -> Tensor:
        aligned = packed.clone() if packed.storage_offset() % size else packed.contiguous()
        return aligned.view(dtype).to(torch.float32)

    return Format(name, ggml_type, 1, size, encode, decode, limit=limit)


# The limits are the largest f32 that does not round to infinity.
F32 = _format("F32", 0, torch.float32, 3.4028234663852886e38)
F16 = _format("F16", 1, torch.float16, 65519.99609375)
BF16 = _format("BF16", 30, torch.bfloat16, 3.396177326406364e38)
