"""Somebody else's decoder of every form in which folders store numbers: the compressed-tensors package.

It unpacks codes and multiplies scales. What it cannot know is told to it: which tensor is the scale, how many
weights share one, and that GPTQ's first version stores zero points less one. AWQ's order of codes is its own.
It has no FP6 with three bits of exponent: its codes are looked up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from moequant.checkpoint.codecs import read_part
from moequant.checkpoint.codecs.awq import Awq
from moequant.checkpoint.codecs.eight_bit import EightBit
from moequant.checkpoint.codecs.gptq import Gptq
from moequant.checkpoint.codecs.mxfp4 import BLOCK, Mxfp4
from moequant.checkpoint.codecs.mxfp6 import Mxfp6
from moequant.checkpoint.codecs.nvfp4 import BLOCK as NV_BLOCK
from moequant.checkpoint.codecs.nvfp4 import Nvfp4, Nvfp4Across
from moequant.checkpoint.codecs.packed_int import PackedInt
from moequant.values import Codec, Origin, Stored, Weight

_E3M2 = torch.tensor([0, 1, 2, 3, *(m * 2**e for e in range(7) for m in range(4, 8))]) / 16
"""FP6 with three bits of exponent, by code: up to 28."""


def by_others(weight: Weight) -> Weight:
    """The same weight, its values decoded by the package, in f32."""
    stored = tuple(replace(each, dtype="F32", codec=_Theirs(each.codec)) for each in weight.origin.stored)
    origin: Origin = replace(weight.origin, stored=stored)
    return replace(weight, origin=origin)


@dataclass(frozen=True, slots=True)
class _Theirs:
    """A codec whose parts are decoded by the package."""

    codec: Codec
    name: str = "compressed-tensors"

    def decode(self, stored: Stored, index: int | None, rows: range | None) -> Tensor:
        """See `Codec`."""
        assert rows is not None
        values = _DECODERS[type(self.codec)](self.codec, _Parts(stored, index))
        return values[rows.start : rows.stop].to(torch.float32)


@dataclass(frozen=True, slots=True)
class _Parts:
    """The parts of one matrix, read whole."""

    stored: Stored
    index: int | None

    def __contains__(self, key: str) -> bool:
        return key in self.stored.parts

    def __getitem__(self, key: str) -> Tensor:
        ref = self.stored.parts[key]
        one = self.index is not None and len(ref.shape) == 3
        return read_part(ref, self.index if one else None)

    def get(self, key: str) -> Tensor | None:
        """The part, None when it is not there."""
        return self[key] if key in self else None


def _dequantize(
    codes: Tensor,
    scale: Tensor,
    block: tuple[int, int],
    zeros: Tensor | None = None,
    whole: Tensor | None = None,
) -> Tensor:
    """The package's product in f32: `block` rows and columns share a scale, which is divided by `whole`."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    by_block = QuantizationStrategy.BLOCK
    args = QuantizationArgs(num_bits=8, type="float", strategy=by_block, block_structure=[*block])
    made: Tensor = dequantize(codes.float(), scale.float(), zeros, args, torch.float32, whole)
    return made


def _eight_bit(codec: EightBit, parts: _Parts) -> Tensor:
    weight, scale, zeros = parts["weight"], parts["scale"], parts.get("zero_point")
    grid = codec.grid
    block = (grid.rows, grid.columns)
    if not grid.rank_rows:
        return _dequantize(weight, scale, block, zeros)
    n_in, squares = weight.shape[1], -(-grid.rank_rows // grid.rows)
    ranks = weight.view(-1, grid.rank_rows, n_in), scale.view(-1, squares, scale.shape[1])
    return torch.cat([_dequantize(*each, block) for each in zip(*ranks, strict=True)])


def _packed_int(codec: PackedInt, parts: _Parts) -> Tensor:
    n_out, n_in = parts.stored.shape[-2:]
    codes = _unpacked(parts["weight"], codec.bits, (n_out, n_in), codec.dense)
    scale, zeros = parts["scale"], parts.get("zero_point")
    if zeros is not None and zeros.dtype == torch.int32:
        zeros = _unpacked(zeros.T, codec.bits, (scale.shape[1], n_out), codec.dense).T
    if "g_idx" in parts:
        return _ordered(codes, scale, zeros, parts["g_idx"])
    return _dequantize(codes, scale, (codec.grid.rows, codec.grid.columns), zeros)


def _gptq(codec: Gptq, parts: _Parts) -> Tensor:
    n_out, n_in = parts.stored.shape[-2:]
    codes = _unpacked(parts["weight"].T, codec.bits, (n_out, n_in))
    scale = parts["scale"].T
    zeros = _unpacked(parts["zero_point"], codec.bits, (scale.shape[1], n_out)).T
    if codec.less_one:
        top = (1 << codec.bits - 1) - 1  # of all ones, the zero point 0 is meant
        zeros = torch.where(zeros == top, -top - 1, zeros.to(torch.int16) + 1)
    if "g_idx" in parts:
        return _ordered(codes, scale, zeros, parts["g_idx"])
    return _dequantize(codes, scale, (1, codec.group), zeros)


def _awq(codec: Awq, parts: _Parts) -> Tensor:
    from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter

    reader = AutoAWQConverter(group_size=codec.group)
    unpacked = reader.unpack_awq(parts["weight"], parts.get("zero_point"), 4)
    if codec.reordered:
        unpacked = reader.reverse_awq_order(*unpacked, 4)
    sign = 8 if codec.signed else 0  # of two's complement
    codes, zeros = (None if each is None else ((each & 15) ^ sign).T - sign for each in unpacked)
    assert codes is not None
    return _dequantize(codes, parts["scale"].T, (1, codec.group), zeros)


def _nvfp4(codec: Nvfp4, parts: _Parts) -> Tensor:
    whole = _whole(parts)
    whole = whole if codec.divides else 1 / whole  # as the package converts ModelOpt's
    return _dequantize(_fp4(parts["weight"]), parts["scale"], (1, NV_BLOCK), whole=whole)


def _nvfp4_across(codec: Nvfp4Across, parts: _Parts) -> Tensor:
    codes = _fp4(parts["weight"].T.contiguous())
    return _dequantize(codes, parts["scale"].T, (1, NV_BLOCK), whole=1 / _whole(parts)).T


def _whole(parts: _Parts) -> Tensor:
    return parts["global_scale"].float().reshape(())


def _mxfp4(codec: Mxfp4, parts: _Parts) -> Tensor:
    return _dequantize(_fp4(parts["weight"]), _powers(parts), (1, BLOCK))


def _mxfp6(codec: Mxfp6, parts: _Parts) -> Tensor:
    from compressed_tensors.compressors.mxfp6.helpers import kE2M3ToFloat, unpack_fp6_from_uint8

    values = unpack_fp6_from_uint8(parts["weight"], *parts.stored.shape[-2:])
    if codec.exponent == 3:
        codes = torch.searchsorted(kE2M3ToFloat, values.abs().float())
        values = _E3M2[codes].copysign(values)
    return _dequantize(values, _powers(parts), (1, BLOCK))


_DECODERS: Mapping[type, Callable[[Any, _Parts], Tensor]] = {
    EightBit: _eight_bit,
    PackedInt: _packed_int,
    Gptq: _gptq,
    Awq: _awq,
    Nvfp4: _nvfp4,
    Nvfp4Across: _nvfp4_across,
    Mxfp4: _mxfp4,
    Mxfp6: _mxfp6,
}


def _fp4(packed: Tensor) -> Tensor:
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8

    made: Tensor = unpack_fp4_from_uint8(packed, len(packed), 2 * packed.shape[1])
    return made


def _powers(parts: _Parts) -> Tensor:
    from compressed_tensors.compressors.mx_utils import decompress_mx_scale

    made: Tensor = decompress_mx_scale(parts["scale"].view(torch.uint8))
    return made


def _unpacked(words: Tensor, bits: int, shape: tuple[int, int], dense: bool = True) -> Tensor:
    """i8 of that shape, less half their range, of words along the rows."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    if not dense:  # as many whole codes as fit, which the package no longer reads: a word is a row of them
        each = 32 // bits
        alone = unpack_from_int32(words.reshape(-1, 1), bits, torch.Size((words.numel(), each)))
        made: Tensor = alone.view(len(words), -1)[:, : shape[1]]
        return made
    found: Tensor = unpack_from_int32(words.contiguous(), bits, torch.Size(shape))
    return found


def _ordered(codes: Tensor, scale: Tensor, zeros: Tensor | None, group_of: Tensor) -> Tensor:
    """Columns in the groups that `group_of` names: sorted by group, each group filled up to the largest."""
    group_of = group_of.long()
    size = int(group_of.bincount(minlength=scale.shape[1]).max())
    out = torch.empty(codes.shape)
    for group in range(scale.shape[1]):
        where = (group_of == group).nonzero().flatten()
        columns = pad(codes[:, where], (0, size - len(where)))
        zero = None if zeros is None else zeros[:, group : group + 1]
        made = _dequantize(columns, scale[:, group : group + 1], (1, size), zero)
        out[:, where] = made[:, : len(where)]
    return out
