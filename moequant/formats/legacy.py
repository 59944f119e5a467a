"""Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0: blocks of 32 with one f16 scale, and in the _1 types an f16 minimum.

    _0: weight = d · (code - middle)        _1: weight = d · code + m

| bytes | holds |
|---|---|
| 2 | d, f16 |
| 0 or 2 | _1 types: m, f16 |
| 0 or 4 | 5-bit types: bit 4 of the codes, one bit a weight, lowest first |
| 16 or 32 | low 4 bits (weight l in the low, l + 16 in the high nibble of byte l), or an int8 each |
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moequant.formats.affine import Affine
from moequant.formats.affine import search_block as search_affine
from moequant.formats.base import Effort, Format
from moequant.formats.layout import (
    half_at,
    half_bytes,
    join_nibbles,
    split_nibbles,
)
from moequant.formats.parts import Parts, Scalar, count_up
from moequant.formats.symmetric import Symmetric, land_block
from moequant.formats.symmetric import search_block as search_symmetric

_Q8 = Symmetric(sub=32, low=-127, high=127)
# Eight bits leave little to win and ggml takes 4 ns a weight: so a few places, and a search at best alone.
_Q8_LANDINGS: dict[Effort, tuple[float, ...]] = {"fast": (127.0,), "default": (127.0, 125.0, 122.0, 118.0)}


def _join_bits(bits: Tensor) -> Tensor:
    """uint8 [n, 32] of 0 or 1 -> [n, 4], lowest first."""
    place = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits.view(-1, 4, 8) << place).sum(-1, dtype=torch.uint8)


def _split_bits(packed: Tensor) -> Tensor:
    """uint8 [n, 4] -> [n, 32]; the inverse of `_join_bits`."""
    place = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (packed[..., None] >> place & 1).view(-1, 32)


def _code_bytes(codes: Tensor, bits: int) -> list[Tensor]:
    """uint8 codes [n, 32] of 4 or 5 bits -> the parts of the block that hold them."""
    high = [_join_bits(codes >> 4)] if bits == 5 else []
    return [*high, join_nibbles(codes & 15, 16)]


def _read_codes(packed: Tensor, bits: int, at: int) -> Tensor:
    """uint8 [n, 32]: the 4- or 5-bit codes that start at byte `at`."""
    if bits == 4:
        return split_nibbles(packed[:, at:], 16)
    return split_nibbles(packed[:, at + 4 :], 16) | _split_bits(packed[:, at : at + 4]) << 4


def _symmetric(name: str, ggml_type: int, bits: int) -> Format:
    middle = 1 << (bits - 1)
    grid = Symmetric(sub=32, low=-middle, high=middle - 1)

    def pack(parts: Parts) -> Tensor:
        return torch.cat([half_bytes(parts.d), *_code_bytes(parts.codes, bits)], 1)

    def unpack(packed: Tensor) -> Parts:
        return _plain_parts(_read_codes(packed, bits, 2), half_at(packed, 0))

    def encode(x: Tensor, w: Tensor, effort: Effort) -> Tensor:
        return pack(search_symmetric(grid, x, w, effort).parts(grid))

    view = Scalar(32, count_up(-middle, middle - 1), unpack, pack, range(1 << bits))
    size = 2 + 4 * bits
    return Format(name, ggml_type, 32, size, encode, view.decode, 1.0, 1.0, tiles=4, view=view, loops=True)


def _affine(name: str, ggml_type: int, bits: int) -> Format:
    grid = Affine(sub=32, top=(1 << bits) - 1)

    def pack(parts: Parts) -> Tensor:
        return torch.cat([half_bytes(parts.d), half_bytes(parts.dmin), *_code_bytes(parts.codes, bits)], 1)

    def unpack(packed: Tensor) -> Parts:
        plain = _plain_parts(_read_codes(packed, bits, 4), half_at(packed, 0))
        return replace(plain, minimum=plain.scale, dmin=half_at(packed, 2))

    def encode(x: Tensor, w: Tensor, effort: Effort) -> Tensor:
        fit = search_affine(grid, x, w, effort)
        return pack(replace(fit.parts(), dmin=-fit.dmin[:, None].to(torch.float16)))

    # The minimum is stored as what is added, so its table holds -1.
    view = Scalar(32, count_up(0, grid.top), unpack, pack, range(grid.top + 1), minima=(-1.0,))
    size = 4 + 4 * bits
    return Format(name, ggml_type, 32, size, encode, view.decode, 1.0, 1.0, tiles=4, view=view, loops=True)


def _plain_parts(codes: Tensor, d: Tensor) -> Parts:
    """A block without sub-blocks."""
    return Parts(codes, torch.zeros_like(codes[:, :1]), codes[:, :0], d, d[:, :0])


def _encode_q8(x: Tensor, w: Tensor, effort: Effort) -> Tensor:
    landings = _Q8_LANDINGS.get(effort)
    fit = search_symmetric(_Q8, x, w, effort) if landings is None else land_block(_Q8, x, w, landings)
    return torch.cat([half_bytes(fit.d), fit.codes.view(torch.uint8)], 1)


def _pack_q8(parts: Parts) -> Tensor:
    return torch.cat([half_bytes(parts.d), parts.codes ^ 128], 1)


def _unpack_q8(packed: Tensor) -> Parts:
    return _plain_parts(packed[:, 2:] ^ 128, half_at(packed, 0))  # 0..255 for -128..127


Q4_0 = _symmetric("Q4_0", 2, 4)
Q4_1 = _affine("Q4_1", 3, 4)
Q5_0 = _symmetric("Q5_0", 6, 5)
Q5_1 = _affine("Q5_1", 7, 5)
VIEW_Q8 = Scalar(32, count_up(-128, 127), _unpack_q8, _pack_q8, range(1, 256))
Q8_0 = Format("Q8_0", 8, 32, 34, _encode_q8, VIEW_Q8.decode, view=VIEW_Q8, loops=True)
