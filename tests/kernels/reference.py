"""Packed weights made without moequant's encoders: random codes with scales that stay finite."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from moequant import formats

HALVES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q6_K": (208,),
    "Q5_K": (0, 2),
    "Q4_K": (0, 2),
    "Q3_K": (108,),
    "Q2_K": (80, 82),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
    "IQ3_S": (0,),
    "IQ3_XXS": (0,),
    "IQ2_S": (0,),
    "IQ2_XS": (0,),
    "IQ2_XXS": (0,),
    "IQ1_S": (0,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
}
"""Where a block's f16 scales lie."""


def random_blocks(name: str, shape: tuple[int, int, int], generator: Generator) -> Tensor:
    """u8 [E, out, row_bytes]: random bits, but f16 scales within ±0.06, MXFP4's exponents mid-range."""
    fmt = formats.get(name)
    count = shape[0] * shape[1] * shape[2] // fmt.block
    data = torch.randint(0, 256, (count, fmt.block_bytes), dtype=torch.uint8, generator=generator)
    scales = ((torch.rand(count, 2, generator=generator) - 0.5) * 0.12).half()
    set_scales(name, data, scales)
    if name == "MXFP4":
        data[:, 0] = torch.randint(110, 126, (count,), dtype=torch.uint8, generator=generator)
    if name == "NVFP4":
        data[:, :4] = torch.randint(1, 64, (count, 4), dtype=torch.uint8, generator=generator)
    return data.view(*shape[:2], -1)


def set_scales(name: str, data: Tensor, scales: Tensor) -> None:
    """Write f16 scales [blocks, 2] (the second where a block has two) into blocks u8 [blocks, bytes]."""
    for at, scale in zip(HALVES.get(name, ()), scales.T, strict=False):
        data[:, at : at + 2] = scale[:, None].contiguous().view(torch.uint8)
    if name == "IQ1_M":  # four nibbles, lowest first, on top of four u16
        bits = scales[:, 0].contiguous().view(torch.int16).int()
        for i in range(4):
            nibble = (bits >> (4 * i) & 15).to(torch.uint8)
            data[:, 49 + 2 * i] = data[:, 49 + 2 * i] & 15 | nibble << 4


def make_extreme(name: str, data: Tensor) -> None:
    """Rows 0 to 3 of u8 [E, out, row_bytes]: zeros, the largest scales, the smallest, NaN in a block."""
    size = formats.get(name).block_bytes
    blocks = data.view(*data.shape[:2], -1, size)
    blocks[:, 0] = 0
    if name in ("MXFP4", "NVFP4"):  # have no NaN; the largest here leaves room for a sum
        exponents = blocks[..., :1] if name == "MXFP4" else blocks[..., :4]
        exponents[:, 1] = 240 if name == "MXFP4" else 126
        exponents[:, 2] = 0 if name == "MXFP4" else 1
        exponents[:, 3] = 1 if name == "MXFP4" else 127
        return
    for row, value in ((1, 65504.0), (2, 2.0**-24)):
        for expert in blocks[:, row]:
            set_scales(name, expert, torch.full((len(expert), 2), value, dtype=torch.float16))
    for expert in blocks[:, 3]:
        set_scales(name, expert[:1], torch.full((1, 2), torch.nan, dtype=torch.float16))


def make_extreme_groups(scales: Tensor) -> None:
    """The same of scales [E, out, groups]."""
    scales[:, 0] = 0
    scales[:, 1] = 1e30
    scales[:, 2] = 1e-30
    scales[:, 3, 0] = torch.nan


def pack_int32(codes: Tensor, bits: int) -> Tensor:
    """compressed-tensors' packing: i8 [..., in] -> i32 [..., in · bits / 32], lowest bits first."""
    per_word = 32 // bits
    unsigned = codes.to(torch.int64) + (1 << bits - 1)
    shifts = torch.arange(per_word) * bits
    words = (unsigned.unflatten(-1, (-1, per_word)) << shifts).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
