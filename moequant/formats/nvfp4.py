"""NVFP4 as safetensors folders hold it: an e4m3 scale for 16 weights, and one number for the matrix.

    weight = (scale / number) · code

A block is 64, 32 or 16 weights of a row: the number in 32 bits, an e4m3 scale for each 16 weights, then
their codes, as `fp4` has them. Files hold the number once: it is that of all rows, and of all weights that
multiply the same inputs (vLLM reads one for gate and up). It has 8 significant bits, so that it and its
inverse, which is the d of a block, are known from each other.

The number decides where in their octave the e4m3 scales fall, and whether the largest of them is cut
off: several are tried on some of the rows.
"""

from __future__ import annotations

import re
from functools import cache, partial
from math import gcd

import torch
from torch import Tensor

from moequant.formats import fp4
from moequant.formats.base import NO_GGML_TYPE, Effort, Format, Shared
from moequant.formats.layout import join_nibbles, split_nibbles
from moequant.formats.parts import Parts, Scalar

GROUP = 16
REACH = 6.0 * 448.0
"""What the largest code and scale make of a number of 1."""

ROWS = 64
"""Rows on which numbers are tried."""

_NAME = re.compile(r"NVFP4_(16|32|64)")

# The number over the one that just reaches the largest weight: below it scales have room to grow.
_TRIED: dict[Effort, tuple[float, ...]] = {
    "fast": (1.0,),
    "default": (1.0, 1 / 1.19, 1 / 1.41, 1 / 1.54, 1 / 1.75),
    "best": tuple(2.0 ** (-k / 12) for k in range(-1, 15)),
}


def name_of(n_in: int) -> str:
    """What `formats.get` calls rows of `n_in`, a multiple of 16."""
    return f"NVFP4_{gcd(n_in, 64)}"


def named(name: str) -> Format | None:
    """The block format of that name, None when it is no name of one."""
    found = _NAME.fullmatch(name)
    return None if found is None else _block_format(int(found.group(1)))


def number_of(d: Tensor) -> Tensor:
    """The number of blocks whose d is its inverse: f32, like d."""
    return (1 / d).to(torch.bfloat16).to(torch.float32)


def split(rows: Tensor, n_in: int) -> tuple[Tensor, Tensor, Tensor]:
    """u8 [n, row_bytes] -> f32 [n], the number of each row; u8 [n, in / 16], e4m3; codes u8 [n, in]."""
    block = gcd(n_in, 64)
    blocks = rows.view(len(rows), n_in // block, -1)
    count = block // GROUP
    numbers = blocks[:, 0, :4].contiguous().view(torch.float32)[:, 0]
    codes = split_nibbles(blocks[..., 4 + count :].reshape(-1, block // 2), GROUP // 2)
    return numbers, blocks[..., 4 : 4 + count].flatten(1), codes.view(len(rows), n_in)


def join(number: Tensor, scales: Tensor, codes: Tensor) -> Tensor:
    """The inverse of `split`, for one number [1] of all rows."""
    rows, n_in = codes.shape
    block = gcd(n_in, 64)
    nibbles = join_nibbles(codes.view(-1, block), GROUP // 2)
    whole = number.view(torch.uint8).expand(len(nibbles), 4)
    return torch.cat([whole, scales.view(len(nibbles), -1), nibbles], 1).view(rows, -1)


@cache
def _block_format(block: int) -> Format:
    count = block // GROUP

    def pack(parts: Parts) -> Tensor:
        number = number_of(parts.d.float()).flatten().contiguous().view(-1, 1).view(torch.uint8)
        return torch.cat([number, parts.scale, join_nibbles(parts.codes, GROUP // 2)], 1)

    def unpack(blocks: Tensor) -> Parts:
        d = 1 / blocks[:, :4].clone().view(torch.float32)
        codes = split_nibbles(blocks[:, 4 + count :], GROUP // 2)
        return Parts(codes, blocks[:, 4 : 4 + count], codes[:, :0], d, d[:, :0])

    def encode_at(x: Tensor, w: Tensor, d: Tensor, effort: Effort) -> Tensor:
        even = (x / d).clamp(-REACH, REACH).reshape(-1, GROUP)
        scale, codes = fp4.fit_nv(even, w.reshape(-1, GROUP), tuple(fp4.NV_STEPS[effort]))
        number = number_of(d).contiguous().view(torch.uint8)
        return torch.cat([number, scale.view(-1, count).to(torch.uint8), codes.view(len(x), -1)], 1)

    def encode(x: Tensor, w: Tensor, effort: Effort) -> Tensor:
        reach = x.abs().amax(-1, keepdim=True)
        return encode_at(x, w, 1 / _number(reach, 1.0), effort)

    def find(x: Tensor, w: Tensor, effort: Effort) -> Tensor:
        d = torch.stack([1 / _search(*each, effort) for each in zip(x, w, strict=True)])
        return d[:, None, None].expand(*x.shape[:2], x.shape[2] // block)

    def decode(blocks: Tensor) -> Tensor:
        parts = unpack(blocks)  # with the roundings of compressed-tensors: f32, and bf16 in the end
        number = blocks[:, :4].clone().view(torch.float32)
        scale = parts.scale.contiguous().view(torch.float8_e4m3fn).float() / number
        codes = torch.tensor(fp4.VALUES, dtype=torch.float32, device=blocks.device)[parts.codes.int()].view(
            len(blocks), -1, GROUP
        )
        return (scale[..., None] * (codes * 0.5)).to(torch.bfloat16).float().flatten(1)

    # fp4's levels are twice the codes' values, its scales half of e4m3's numbers.
    scales = tuple(fp4.ue4m3(torch.arange(127, dtype=torch.int32)).tolist())
    view = Scalar(GROUP, tuple(fp4.VALUES), unpack, pack, range(16), scales, range(1, 127))
    return Format(
        f"NVFP4_{block}", NO_GGML_TYPE, block, 4 + count + block // 2, encode, decode,
        limit=1e30, view=view, shared=Shared(find, encode_at, across=True),
    )  # fmt: skip


def _number(reach: Tensor, factor: float) -> Tensor:
    """Numbers of 8 bits for largest weights of size `reach`; 1 where all are 0."""
    whole = torch.where(reach > 0, factor * REACH / reach.clamp_min(1e-30), 1.0)
    return whole.to(torch.bfloat16).to(torch.float32)


def _search(x: Tensor, w: Tensor, effort: Effort) -> Tensor:
    """The best number for x [out, in], w [in]: f32 []."""
    reach, tried = x.abs().amax(), _TRIED[effort]
    if len(tried) == 1:
        return _number(reach, tried[0])
    rows = x[torch.linspace(0, len(x) - 1, min(ROWS, len(x))).round().long()]
    weights = w.expand_as(rows).reshape(-1, GROUP)
    price = partial(_lost, rows.reshape(-1, GROUP), weights)
    numbers = [_number(reach, factor) for factor in tried]
    return min(numbers, key=price)


def _lost(x: Tensor, w: Tensor, number: Tensor) -> float:
    """Weighted squared error of groups [n, 16] with the best e4m3 scales."""
    even = (x * number).clamp(-REACH, REACH)
    code, _ = fp4.fit_nv.eager(even, w, tuple(fp4.NV_STEPS["fast"]))  # compiled, it would be for every width
    scale = fp4.ue4m3(code)
    off = even.abs() - scale * fp4.round_size(even.abs() / scale)
    return float((w * off.square()).sum() / number.square())
