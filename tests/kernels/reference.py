"""Packed weights made without moequant's encoders: random codes with scales that stay finite."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from moequant import formats

HALVES = {
    "Q8_0": (0,),
    "Q6_K": (208,),
    "Q5_K": (0, 2),
    "Q4_K": (0, 2),
    "Q3_K": (108,),
    "Q2_K": (80, 82),
    "IQ4_XS": (0,),
}
"""Where a block's f16 scales lie."""


def random_blocks(name: str, shape: tuple[int, int, int], generator: Generator) -> Tensor:
    """u8 [E, out, row_bytes]: random bits, but f16 scales within ±0.06, MXFP4's exponents mid-range."""
    fmt = formats.get(name)
    count = shape[0] * shape[1] * shape[2] // fmt.block
    data = torch.randint(0, 256, (count, fmt.block_bytes), dtype=torch.uint8, generator=generator)
    for at in HALVES.get(name, ()):
        scale = (torch.rand(count, 1, generator=generator) - 0.5) * 0.12
        data[:, at : at + 2] = scale.half().view(torch.uint8)
    if name == "MXFP4":
        data[:, 0] = torch.randint(110, 126, (count,), dtype=torch.uint8, generator=generator)
    return data.view(*shape[:2], -1)


def pack_int32(codes: Tensor, bits: int) -> Tensor:
    """compressed-tensors' packing: i8 [..., in] -> i32 [..., in · bits / 32], lowest bits first."""
    per_word = 32 // bits
    unsigned = codes.to(torch.int64) + (1 << bits - 1)
    shifts = torch.arange(per_word) * bits
    words = (unsigned.unflatten(-1, (-1, per_word)) << shifts).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
