"""Weights whose stored numbers a ggml type holds exactly, in that type's bytes: nothing is rounded."""

from __future__ import annotations

import torch
from torch import Tensor

from moequant.checkpoint.codecs.awq import Awq
from moequant.checkpoint.codecs.base import WHOLE, read_part
from moequant.checkpoint.codecs.bits import nibbles
from moequant.checkpoint.codecs.eight_bit import EightBit
from moequant.checkpoint.codecs.ggml import Ggml
from moequant.checkpoint.codecs.gptq import Gptq
from moequant.checkpoint.codecs.integers import Integers
from moequant.checkpoint.codecs.mxfp4 import Mxfp4
from moequant.checkpoint.codecs.nvfp4 import Nvfp4
from moequant.checkpoint.codecs.packed_int import PackedInt
from moequant.checkpoint.codecs.scales import numbers
from moequant.formats.layout import half_bytes, join_nibbles
from moequant.values import Stored

_BITS = {"Q4_0": 4, "Q5_0": 5, "Q8_0": 8}
"""Types of 32 whole numbers and one f16 scale."""


def as_shipped(stored: Stored) -> str | None:
    """The ggml type that holds exactly what the files do: "MXFP4", "NVFP4" (beside `multiplier`), "Q4_0",
    "Q5_0", "Q8_0", or the dtype of plain tensors and of those that bf16 holds; None when there is none.

    From headers: integers are taken to have scales that f16 holds, and GPTQ's and AWQ's symmetric ones the
    middle as zero point. `repack`, which sees them, has the last word.
    """
    codec = stored.codec
    if isinstance(codec, Ggml):
        return codec.name
    if isinstance(codec, Mxfp4):
        return "MXFP4"
    if stored.dtype in WHOLE:
        return None
    if isinstance(codec, Nvfp4):
        return "NVFP4" if stored.shape[-1] % 64 == 0 else None
    width = _width(stored)
    if width is None:
        return None if stored.dtype == "F32" and stored.codec.name != "plain" else stored.dtype
    if stored.parts["scale"].dtype not in ("F16", "BF16") or stored.shape[-1] % 32:
        return None
    return next((name for name, bits in _BITS.items() if bits >= width), None)


def _width(stored: Stored) -> int | None:
    """Bits that the whole numbers of a weight need, its zero point taken off; None when it has none.

    None also where blocks of 32 do not share a scale.
    """
    codec = stored.codec
    if codec.act_order if isinstance(codec, Gptq) else "g_idx" in stored.parts:
        return None
    if isinstance(codec, EightBit) and stored.parts["weight"].dtype == "I8":
        bits, columns = 8, codec.grid.columns
    elif isinstance(codec, PackedInt):
        bits, columns = codec.bits, codec.grid.columns
    elif isinstance(codec, Gptq):
        bits, columns = codec.bits, codec.group
    elif isinstance(codec, Awq):
        bits, columns = 4, codec.group
    else:
        return None
    symmetric = codec.symmetric if isinstance(codec, Gptq | Awq) else "zero_point" not in stored.parts
    return None if columns % 32 else bits if symmetric else bits + 1


def repack(stored: Stored, format_name: str, index: int | None, rows: range) -> Tensor | None:
    """Rows of matrix `index` in the blocks of a ggml type, uint8 [len(rows), row_bytes]; see `Stored.read`.

    None when the type does not hold them exactly: decode, and round. NVFP4 has one more number beside the
    blocks, `multiplier`. CheckpointError as for decoding.
    """
    codec = stored.codec
    n_in = stored.shape[-1]
    if isinstance(codec, Ggml):
        return codec.blocks(stored, index, rows) if format_name == codec.name else None
    if isinstance(codec, Mxfp4) and format_name == "MXFP4" and n_in % 32 == 0:
        scale = stored.parts["scale"]
        numbers(scale, index, rows)  # refuses NaN
        return _fp4(stored, index, rows, read_part(scale, index, rows), 16)
    if isinstance(codec, Nvfp4) and format_name == "NVFP4" and n_in % 64 == 0:
        return _fp4(stored, index, rows, codec.scales(stored, index, rows), 8)
    if format_name in _BITS and isinstance(codec, (EightBit, PackedInt, Gptq, Awq)):
        whole = codec.integers(stored, index, rows)
        return None if whole is None else _integers(whole, _BITS[format_name])
    return None


def multiplier(stored: Stored, index: int | None) -> Tensor | None:
    """f32 []: what NVFP4's blocks of matrix `index` are multiplied by, GGUF's `.scale`; None for others."""
    return stored.codec.multiplier(stored, index) if isinstance(stored.codec, Nvfp4) else None


def _fp4(stored: Stored, index: int | None, rows: range, scales: Tensor, run: int) -> Tensor:
    """Scale bytes, then codes: of each 2 · run the second run in the high nibbles."""
    size = 64 if run == 8 else 32
    codes = nibbles(read_part(stored.parts["weight"], index, rows)).view(-1, size)
    blocks = torch.cat([scales.view(torch.uint8).reshape(len(codes), -1), join_nibbles(codes, run)], 1)
    return blocks.view(len(rows), -1)


def _integers(whole: Integers, bits: int) -> Tensor | None:
    """Blocks of 32 with an f16 scale, when codes and scales are such that they hold them."""
    scales = whole.block_scales(32)
    middle = 1 << bits - 1
    if scales is None or not (scales.to(torch.float16) == scales).all():
        return None
    if len(whole.codes) and not -middle <= whole.codes.min() <= whole.codes.max() < middle:
        return None
    d = half_bytes(scales.reshape(-1))
    if bits == 8:
        parts = [d, whole.codes.to(torch.int8).view(torch.uint8).reshape(-1, 32)]
    else:
        codes = (whole.codes + middle).to(torch.uint8).reshape(-1, 32)
        high = [_bits_of(codes >> 4)] if bits == 5 else []
        parts = [d, *high, join_nibbles(codes & 15, 16)]
    return torch.cat(parts, 1).view(len(whole.codes), -1)


def _bits_of(high: Tensor) -> Tensor:
    """uint8 [n, 32] of 0 or 1 -> [n, 4], lowest first."""
    place = torch.arange(8, dtype=torch.uint8)
    return (high.view(-1, 4, 8) << place).sum(-1, dtype=torch.uint8)
