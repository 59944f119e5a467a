"""Codes of a few bits out of bytes and 32-bit words, the lowest bits first."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of FP4's codes 0..7; codes 8..15 are their negatives."""


def period(bits: int, dense: bool) -> tuple[int, int]:
    """After how many words, and so many codes, codes start at a word's first bit again.

    Dense: codes lie end to end and may straddle words; else as many as fit whole, the rest of a word empty.
    """
    return (bits, 32) if dense and 32 % bits else (1, 32 // bits)


def words_for(count: int, bits: int, dense: bool) -> int:
    """Words that hold `count` codes."""
    return -(-count * bits // 32) if dense else -(-count // (32 // bits))


def unpack(words: Tensor, bits: int, dense: bool = True) -> Tensor:
    """int32 [n, words] -> uint8 [n, codes], the empty ones at the end included; bits is 2..8."""
    words = words.contiguous()
    if bits in (4, 8):
        # Flat first: one column of a transposed matrix is contiguous, but not to `view`.
        as_bytes = words.flatten().view(torch.uint8).view(len(words), -1)
        return as_bytes if bits == 8 else nibbles(as_bytes)
    span, count = period(bits, dense)
    groups = pad(words, (0, -words.shape[1] % span)).view(len(words), -1, span)
    out = torch.empty((*groups.shape[:2], count), dtype=torch.uint8)
    for i in range(count):
        word, shift = divmod(i * bits, 32)
        code = groups[..., word] >> shift
        if shift + bits > 32:  # >> fills with the sign: keep the bits that were there
            code = code & ((1 << 32 - shift) - 1) | groups[..., word + 1] << 32 - shift
        out[..., i] = code & ((1 << bits) - 1)
    return out.view(len(words), -1)


def nibbles(packed: Tensor) -> Tensor:
    """uint8 [n, k] -> [n, 2 k]: the low nibble of each byte, then the high one."""
    return torch.stack([packed & 15, packed >> 4], -1).view(len(packed), -1)


def e2m1(packed: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 [n, k] of two FP4 codes -> f32 or bf16 [n, 2 k], the low nibble first."""
    return look_up(_pairs(dtype), packed).view(dtype)


def floats(packed: Tensor) -> Tensor:
    """An 8-bit float type -> f32, by table: several times as fast as torch's conversion."""
    return look_up(_numbers(packed.dtype), packed.view(torch.uint8))


def look_up(table: Tensor, index: Tensor) -> Tensor:
    """table[index] for a uint8 index, which torch takes for a mask; numpy knows no bf16."""
    return torch.from_numpy(table.numpy()[index.numpy()])


@cache
def _numbers(dtype: torch.dtype) -> Tensor:
    """f32 [256]: the number of every byte."""
    return torch.arange(256, dtype=torch.uint8).view(dtype).to(torch.float32)


@cache
def _pairs(dtype: torch.dtype) -> Tensor:
    """[256]: the two numbers of every byte, side by side in one integer."""
    values = torch.tensor(E2M1, dtype=dtype)
    codes = nibbles(torch.arange(256, dtype=torch.uint8)[:, None]).long()
    pairs = torch.cat([values, -values])[codes]
    return pairs.view(torch.int64 if dtype == torch.float32 else torch.int32)[:, 0]
