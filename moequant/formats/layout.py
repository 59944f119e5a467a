"""How blocks lie in memory while they are searched, and the few bit fields that formats share.

A search looks at many candidate scales for each sub-block. Here `LANES` neighbouring blocks
lie side by side, so that one vector instruction serves as many blocks and every reduction
over the weights of a sub-block is a plain sum of vectors: [tiles, sub-blocks, weights, LANES].
"""

from __future__ import annotations

import torch
from torch import Tensor

LANES = 16


def to_lanes(x: Tensor, sub: int, fill: float = 0.0) -> Tensor:
    """[n, block] -> [ceil(n / LANES), block / sub, sub, LANES]; missing blocks hold `fill`."""
    n, block = x.shape
    if n % LANES:
        x = torch.cat([x, x.new_full((-n % LANES, block), fill)])
    return x.view(-1, LANES, block // sub, sub).permute(0, 2, 3, 1).contiguous()


def from_lanes(x: Tensor, n: int) -> Tensor:
    """[tiles, ..., LANES] -> [n, everything between, flat]; the inverse of `to_lanes`."""
    return x.movedim(-1, 1).reshape(x.shape[0] * LANES, -1)[:n]


def half(x: Tensor) -> Tensor:
    """x rounded to what an f16 scale can hold, as f32."""
    return x.clamp(-65504.0, 65504.0).to(torch.float16).to(torch.float32)


def half_at(packed: Tensor, at: int) -> Tensor:
    """f16 [n, 1]: the little-endian f16 at byte `at` of each block, bit for bit."""
    return packed[:, at : at + 2].clone().view(torch.float16)  # a copy is aligned


def half_bytes(x: Tensor) -> Tensor:
    """f32 or f16 [n] or [n, 1] -> uint8 [n, 2]: the bytes of f16."""
    return x.to(torch.float16).flatten().contiguous().view(-1, 1).view(torch.uint8)


def split_pairs(packed: Tensor) -> Tensor:
    """uint8 [n, k] of four 2-bit fields -> [n, 4 k]: of each 128, fields l, l + 32, … share a byte."""
    shift = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=packed.device)[:, None]
    return (packed.reshape(len(packed), -1, 1, 32) >> shift & 3).view(len(packed), -1)


def join_pairs(codes: Tensor) -> Tensor:
    """uint8 [n, 128 k] of 2 bits -> [n, 32 k]; the inverse of `split_pairs`."""
    a, b, c, d = codes.view(len(codes), -1, 4, 32).unbind(2)
    return (a | b << 2 | c << 4 | d << 6).view(len(codes), -1)


def split_planes(packed: Tensor) -> Tensor:
    """uint8 [n, 32] of bits -> [n, 256]: byte l has those of weights l, l + 32, …, lowest bit first."""
    bit = torch.arange(8, dtype=torch.uint8, device=packed.device)[:, None]
    return (packed[:, None] >> bit & 1).view(-1, 256)


def join_planes(bits: Tensor) -> Tensor:
    """uint8 [n, 256] of 0 or 1 -> [n, 32]; the inverse of `split_planes`."""
    bit = torch.arange(8, dtype=torch.uint8, device=bits.device)[:, None]
    return (bits.view(-1, 8, 32) << bit).sum(1, dtype=torch.uint8)


def join_nibbles(codes: Tensor, run: int) -> Tensor:
    """uint8 [n, block] of 4-bit codes -> [n, block / 2]: of each 2 · run codes, the second run goes high."""
    low, high = codes.view(len(codes), -1, 2, run).unbind(2)
    return (low | high << 4).reshape(len(codes), -1)


def split_nibbles(packed: Tensor, run: int) -> Tensor:
    """uint8 [n, block / 2] -> [n, block]; the inverse of `join_nibbles`."""
    runs = packed.reshape(len(packed), -1, 1, run)
    return torch.cat([runs & 15, runs >> 4], 2).view(len(packed), -1)


def storable(step: Tensor) -> Tensor:
    """step >= 0 as f16 will store it where that matters: multiples of 2^-24, never zero; cheaper than `half`.

    Next to 0.75 an f32 holds multiples of 2^-24 only; the eleven bits that f16 has above 2^-14 are plenty.
    """
    return (step + 0.75 - 0.75).clamp_min(2.0**-24)


def positive_half(x: Tensor) -> Tensor:
    """x >= 0 rounded to f16, but never to zero unless it is zero: as f32."""
    return torch.where(x > 0, half(x).clamp_min(2.0**-24), 0.0)


def inverse(s: Tensor) -> Tensor:
    """1 / s, and 0 where s is 0: a block without a scale has all its codes at 0."""
    return torch.where(s != 0, 1 / s, 0.0)


def clip(codes: Tensor, top: float) -> Tensor:
    """codes limited to 0..top, by relu: minding NaN, inductor spends three instructions a side on clamp."""
    return top - torch.relu(top - torch.relu(codes))


def signed_half(x: Tensor) -> Tensor:
    """x rounded to f16, but never to zero unless it is zero: as f32."""
    near = half(x)
    tiny = torch.where(x > 0, 2.0**-24, torch.where(x < 0, -(2.0**-24), 0.0))
    return torch.where(near == 0, tiny, near)


def better(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Of two fits whose first member is their error, the lesser, block by block."""
    take = b[0] < a[0]
    return tuple(torch.where(take, new, old) for old, new in zip(a, b, strict=True))
