"""The table of decoders: what a lane makes of its piece of a row, for every format.

    decode(row, skew, piece, side, ISA) -> (code words, scales, offsets)

`row` points to the aligned word in which the row starts, `skew` bytes before it; `piece` is the number
of the piece in the row; `side` points to what lies apart, a scale or the rows of a grid. Code words are u32
of four signed bytes, one for each weight, in the format's `order`. A group of `group` weights has one
scale, and where offsets are returned one of these, all f32:

    weight = scale · (code - zero) + offset
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from moequant.kernels import (
    integer,
    iq1,
    iq2,
    iq3,
    legacy,
    q2_k,
    q3_k,
    q4_k,
    q6_k,
    quarters,
    tables,
    ternary,
)


@dataclass(frozen=True, slots=True)
class Decoder:
    """A format: `block` weights in `bytes`, decoded in pieces of `piece`; groups of `group` share a scale.

    `order` says which weight of its length each place of the kernel's order is. `grid` names the grid of
    gguf whose rows the decoder loads. With offsets, `middle` is about the mean code.
    """

    decode: Callable[..., Any]
    block: int
    bytes: int
    piece: int
    group: int
    order: tuple[int, ...]
    zero: int = 0
    grid: str = ""
    middle: int = 0

    @property
    def record(self) -> int:
        """Words of a piece of activations (`activations.py`)."""
        words = self.piece // 2 + self.piece // self.group + 1
        return -(-words // 4) * 4


def _simple(decode: Callable[..., Any], size: int, zero: int = 0, piece: int = legacy.PIECE) -> Decoder:
    """A block of 32 weights in their own order."""
    return Decoder(decode, legacy.BLOCK, size, piece, piece, tuple(range(piece)), zero)


def _quartered(module: ModuleType, zero: int = 0) -> Decoder:
    return Decoder(
        module.decode, quarters.BLOCK, module.BYTES, quarters.PIECE, module.GROUP, tuple(quarters.ORDER), zero
    )


def _gridded(decode: Callable[..., Any], size: int, group: int, grid: str) -> Decoder:
    return Decoder(decode, 256, size, 32, group, tuple(range(32)), 0, grid)


_32, _16 = tuple(tables.ORDER32), tuple(tables.ORDER16)

DECODERS = {
    "Q4_0": _simple(legacy.decode40, legacy.BYTES40, legacy.ZERO4),
    "Q4_1": replace(_simple(legacy.decode41, legacy.BYTES41), middle=8),
    "Q5_0": _simple(legacy.decode50, legacy.BYTES50, legacy.ZERO5),
    "Q5_1": replace(_simple(legacy.decode51, legacy.BYTES51), middle=16),
    "Q8_0": _simple(legacy.decode80, legacy.BYTES80, piece=legacy.PIECE80),
    "Q2_K": replace(_quartered(q2_k), middle=2),
    "Q3_K": _quartered(q3_k, q3_k.ZERO),
    "Q4_K": Decoder(q4_k.decode4, 256, q4_k.BYTES4, q4_k.PIECE, q4_k.GROUP, tuple(q4_k.ORDER), middle=8),
    "Q5_K": Decoder(q4_k.decode5, 256, q4_k.BYTES5, q4_k.PIECE, q4_k.GROUP, tuple(q4_k.ORDER), middle=16),
    "Q6_K": _quartered(q6_k, q6_k.ZERO),
    "IQ4_NL": Decoder(tables.decode_nl, 32, tables.BYTES_NL, 32, tables.GROUP_IQ, _32),
    "IQ4_XS": Decoder(tables.decode_xs, 256, tables.BYTES_XS, 32, tables.GROUP_IQ, _32),
    "IQ3_S": _gridded(iq3.decode_s, iq3.BYTES_S, iq3.GROUP, "IQ3_S"),
    "IQ3_XXS": _gridded(iq3.decode_xxs, iq3.BYTES_XXS, iq3.GROUP, "IQ3_XXS"),
    "IQ2_S": _gridded(iq2.decode_s, iq2.BYTES_S, iq2.GROUP, "IQ2_S"),
    "IQ2_XS": _gridded(iq2.decode_xs, iq2.BYTES_XS, iq2.GROUP, "IQ2_XS"),
    "IQ2_XXS": _gridded(iq2.decode_xxs, iq2.BYTES_XXS, iq2.GROUP_XXS, "IQ2_XXS"),
    "IQ1_S": _gridded(iq1.decode_s, iq1.BYTES_S, iq1.GROUP_S, "IQ1_S"),
    "IQ1_M": _gridded(iq1.decode_m, iq1.BYTES_M, iq1.GROUP_M, "IQ1_S"),
    "TQ1_0": Decoder(ternary.decode1, 256, ternary.BYTES1, 64, 64, tuple(ternary.ORDER1), ternary.ZERO),
    "TQ2_0": Decoder(ternary.decode2, 256, ternary.BYTES2, 64, 64, tuple(quarters.ORDER), ternary.ZERO),
    "MXFP4": Decoder(tables.decode_mx, 32, tables.BYTES_MX, 32, 32, _32),
    "NVFP4": Decoder(tables.decode_nv, 64, tables.BYTES_NV, 32, tables.GROUP_NV, _16),
    "INT4": Decoder(integer.decode4, 32, integer.BYTES4, 32, 32, tuple(integer.ORDER4), integer.ZERO4),
    "INT8": Decoder(integer.decode8, 32, integer.BYTES8, 32, 32, tuple(range(32))),
}
