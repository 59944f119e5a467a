"""How folders store the weight of one linear module: names, types, values, and the way back.

`Storage.tensors` takes a weight as rounding left it, in the bytes of its block format (`formats.get`), and
`Storage.packed` is the inverse; what the bytes mean is the block format's to say. So a new number format in
a folder is a block format and one class here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moequant import formats
from moequant.containers.folders.shards import Entry
from moequant.formats import float8, groups, nvfp4
from moequant.formats.float8 import SIDE, Span
from moequant.formats.groups import GroupFormat
from moequant.formats.layout import join_nibbles, split_nibbles

INPUT = "input_global_scale"
"""The tensor that scales what a module of NVFP4 is fed: F32 [1], which divides. Calibration knows it."""

INPUT_FP8 = "input_scale"
"""The same of FP8; it multiplies."""

_EVEN_FIRST = [0, 2, 4, 6, 1, 3, 5, 7]
"""AWQ: which output of its eight is in each nibble of a word, lowest first."""

_DTYPES = {torch.float16: "F16", torch.bfloat16: "BF16"}


class Storage(Protocol):
    """The tensors of one linear module [out, in]; `suffixes` are the names of those of its weight, after the
    module's. One that scales inputs may stand behind them."""

    @property
    def suffixes(self) -> Sequence[str]:
        """See the class."""

    def block_format(self, n_in: int) -> str:
        """What `formats.get` calls the numbers of rows of `n_in`."""

    def entries(self, module: str, n_out: int, n_in: int) -> tuple[Entry, ...]:
        """Names, types and shapes, in the order of `suffixes`; last, if there is one, what scales inputs."""

    def tensors(self, rows: Tensor, n_in: int) -> tuple[Tensor, ...]:
        """u8 [out, row_bytes] of the block format -> the values of `entries`, but for that of inputs."""

    def packed(self, stored: Mapping[str, Tensor], n_in: int) -> Tensor:
        """The inverse of `tensors`, of values by suffix."""


@dataclass(frozen=True, slots=True)
class PackedIntegers:
    """compressed-tensors `pack-quantized`.

    | tensor | dtype | shape |
    |---|---|---|
    | weight_packed | I32 | [out, in · bits / 32], lowest bits first along `in`, code + 2^(bits-1) |
    | weight_scale | BF16 or F16 | [out, in / group] |
    | weight_shape | I64 | [2], out and in |
    """

    fmt: GroupFormat
    suffixes: Sequence[str] = ("weight_packed", "weight_scale", "weight_shape")

    def block_format(self, n_in: int) -> str:
        """See `Storage`."""
        return self.fmt.of_rows(n_in).name

    def entries(self, module: str, n_out: int, n_in: int) -> tuple[Entry, ...]:
        """See `Storage`."""
        scales = (n_out, self.fmt.groups(n_in))
        return (
            Entry(f"{module}.weight_packed", "I32", (n_out, self.fmt.words(n_in))),
            Entry(f"{module}.weight_scale", _DTYPES[self.fmt.scale_dtype], scales),
            Entry(f"{module}.weight_shape", "I64", (2,)),
        )

    def tensors(self, rows: Tensor, n_in: int) -> tuple[Tensor, ...]:
        """See `Storage`."""
        codes, scales = groups.split(self.fmt, rows, n_in)
        return groups.pack(codes, self.fmt.bits), scales, torch.tensor(codes.shape, dtype=torch.int64)

    def packed(self, stored: Mapping[str, Tensor], n_in: int) -> Tensor:
        """See `Storage`."""
        return groups.join(self.fmt, *self.integers(stored, n_in))

    def integers(self, stored: Mapping[str, Tensor], n_in: int) -> tuple[Tensor, Tensor]:
        """Codes i8 [out, in] and scales [out, groups]."""
        return groups.unpack(stored["weight_packed"], self.fmt.bits, n_in), stored["weight_scale"]


@dataclass(frozen=True, slots=True)
class GptqIntegers:
    """GPTQ, first version, symmetric, without activation order, as AutoGPTQ and GPTQModel pack it.

    | tensor | dtype | shape |
    |---|---|---|
    | qweight | I32 | [in · bits / 32, out], lowest bits first along `in`, code + 2^(bits-1) |
    | qzeros | I32 | [in / group, out · bits / 32], the zero point 2^(bits-1), less one |
    | scales | F16 | [in / group, out] |
    | g_idx | I32 | [in], the group of each channel |
    """

    fmt: GroupFormat
    suffixes: Sequence[str] = ("qweight", "qzeros", "scales", "g_idx")

    def block_format(self, n_in: int) -> str:
        """See `Storage`."""
        return self.fmt.of_rows(n_in).name

    def entries(self, module: str, n_out: int, n_in: int) -> tuple[Entry, ...]:
        """See `Storage`."""
        count = self.fmt.groups(n_in)
        return (
            Entry(f"{module}.qweight", "I32", (self.fmt.words(n_in), n_out)),
            Entry(f"{module}.qzeros", "I32", (count, self.fmt.words(n_out))),
            Entry(f"{module}.scales", "F16", (count, n_out)),
            Entry(f"{module}.g_idx", "I32", (n_in,)),
        )

    def tensors(self, rows: Tensor, n_in: int) -> tuple[Tensor, ...]:
        """See `Storage`."""
        codes, scales = groups.split(self.fmt, rows, n_in)
        # pack() adds 2^(bits-1) to each code: -1 is stored as the zero point less one.
        minus = torch.full((scales.shape[1], len(codes)), -1, dtype=torch.int8)
        zeros = groups.pack(minus, self.fmt.bits)
        group_of = torch.arange(n_in, dtype=torch.int32) // self.fmt.size(n_in)
        return groups.pack(codes, self.fmt.bits).T.contiguous(), zeros, scales.T.contiguous(), group_of

    def packed(self, stored: Mapping[str, Tensor], n_in: int) -> Tensor:
        """See `Storage`."""
        return groups.join(self.fmt, *self.integers(stored, n_in))

    def integers(self, stored: Mapping[str, Tensor], n_in: int) -> tuple[Tensor, Tensor]:
        """Codes i8 [out, in] and scales [out, groups]."""
        return groups.unpack(stored["qweight"].T, self.fmt.bits, n_in), stored["scales"].T


@dataclass(frozen=True, slots=True)
class AwqIntegers:
    """AWQ in gemm order, as AutoAWQ packs it: 4 bits, symmetric.

    | tensor | dtype | shape |
    |---|---|---|
    | qweight | I32 | [in, out / 8], code + 8 |
    | qzeros | I32 | [in / group, out / 8], the zero point 8 |
    | scales | F16 | [in / group, out] |

    Of the eight outputs of a word the even ones come first, lowest bits first, then the odd ones.
    """

    fmt: GroupFormat
    suffixes: Sequence[str] = ("qweight", "qzeros", "scales")

    def block_format(self, n_in: int) -> str:
        """See `Storage`."""
        return self.fmt.of_rows(n_in).name

    def entries(self, module: str, n_out: int, n_in: int) -> tuple[Entry, ...]:
        """See `Storage`."""
        count = self.fmt.groups(n_in)
        return (
            Entry(f"{module}.qweight", "I32", (n_in, self.fmt.words(n_out))),
            Entry(f"{module}.qzeros", "I32", (count, self.fmt.words(n_out))),
            Entry(f"{module}.scales", "F16", (count, n_out)),
        )

    def tensors(self, rows: Tensor, n_in: int) -> tuple[Tensor, ...]:
        """See `Storage`."""
        codes, scales = groups.split(self.fmt, rows, n_in)
        eights = codes.T.reshape(n_in, -1, 8)[..., _EVEN_FIRST].flatten(1)
        # pack() adds 8 to each code: 0 is stored as the zero point.
        zeros = torch.zeros((scales.shape[1], len(codes)), dtype=torch.int8)
        return groups.pack(eights, self.fmt.bits), groups.pack(zeros, self.fmt.bits), scales.T.contiguous()

    def packed(self, stored: Mapping[str, Tensor], n_in: int) -> Tensor:
        """See `Storage`."""
        return groups.join(self.fmt, *self.integers(stored, n_in))

    def integers(self, stored: Mapping[str, Tensor], n_in: int) -> tuple[Tensor, Tensor]:
        """Codes i8 [out, in] and scales [out, groups]."""
        scales = stored["scales"].T
        eights = groups.unpack(stored["qweight"], self.fmt.bits, len(scales)).view(n_in, -1, 8)
        codes = torch.empty_like(eights)
        codes[..., _EVEN_FIRST] = eights
        return codes.flatten(1).T, scales


@dataclass(frozen=True, slots=True)
class PlainIntegers:
    """compressed-tensors `int-quantized`: `weight` I8 [out, in] and `weight_scale` [out, 1]."""

    fmt: GroupFormat
    suffixes: Sequence[str] = ("weight", "weight_scale")

    def block_format(self, n_in: int) -> str:
        """See `Storage`."""
        return self.fmt.of_rows(n_in).name

    def entries(self, module: str, n_out: int, n_in: int) -> tuple[Entry, ...]:
        """See `Storage`."""
        return (
            Entry(f"{module}.weight", "I8", (n_out, n_in)),
            Entry(f"{module}.weight_scale", _DTYPES[self.fmt.scale_dtype], (n_out, 1)),
        )

    def tensors(self, rows: Tensor, n_in: int) -> tuple[Tensor, ...]:
        """See `Storage`."""
        return groups.split(self.fmt, rows, n_in)

    def packed(self, stored: Mapping[str, Tensor], n_in: int) -> Tensor:
        """See `Storage`."""
        return groups.join(self.fmt, stored["weight"], stored["weight_scale"])


@dataclass(frozen=True, slots=True)
class Float8:
    """compressed-tensors `float-quantized`: `weight` F8_E4M3 [out, in] and `weight_scale` BF16 or F16.

    The scale is [out, 1], of squares of 128 [out / 128, in / 128], and [1] of a matrix. With `scales_inputs`
    also `INPUT_FP8`.
    """

    span: Span
    scale_dtypes: tuple[torch.dtype, ...]
    scales_inputs: bool = False
    suffixes: Sequence[str] = ("weight", "weight_scale")

    def block_format(self, n_in: int) -> str:
        """See `Storage`."""
        return float8.name_of(self.span, n_in, self.scale_dtypes)

    def entries(self, module: str, n_out: int, n_in: int) -> tuple[Entry, ...]:
        """See `Storage`."""
        squares = (-(-n_out // SIDE), -(-n_in // SIDE))
        shape = {"row": (n_out, 1), "square": squares, "matrix": (1,)}[self.span]
        return (
            Entry(f"{module}.weight", "F8_E4M3", (n_out, n_in)),
            Entry(f"{module}.weight_scale", _DTYPES[self.scale_dtypes[-1]], shape),
            *((Entry(f"{module}.{INPUT_FP8}", "F32", (1,)),) if self.scales_inputs else ()),
        )

    def tensors(self, rows: Tensor, n_in: int) -> tuple[Tensor, ...]:
        """See `Storage`."""
        blocks = rows.view(len(rows), n_in // self._block(n_in), -1)
        codes = blocks[..., 2:].flatten(1).contiguous().view(torch.float8_e4m3fn)
        scales = blocks[..., :2].contiguous().view(self.scale_dtypes[-1])[..., 0]
        match self.span:
            case "square":
                return codes, scales[::SIDE].contiguous()
            case "matrix":
                return codes, scales[:1, 0].contiguous()
        return codes, scales

    def packed(self, stored: Mapping[str, Tensor], n_in: int) -> Tensor:
        """See `Storage`."""
        codes = stored["weight"].view(torch.uint8).view(len(stored["weight"]), -1, self._block(n_in))
        scales = stored["weight_scale"]
        if self.span == "square":
            scales = scales.repeat_interleave(SIDE, 0)[: len(codes)]
        elif self.span == "matrix":
            scales = scales.view(1, 1).expand(len(codes), 1)
        scales = scales[..., None].contiguous().view(torch.uint8)
        return torch.cat([scales, codes], -1).flatten(1)

    def _block(self, n_in: int) -> int:
        return SIDE if self.span == "square" else n_in


@dataclass(frozen=True, slots=True)
class Mxfp4:
    """compressed-tensors `mxfp4-pack-quantized`.

    `weight_packed` U8 [out, in / 2], the low nibble the even weight, and `weight_scale` U8 [out, in / 32],
    exponents plus 127. The codes and exponents are those of ggml's MXFP4.
    """

    suffixes: Sequence[str] = ("weight_packed", "weight_scale")

    def block_format(self, n_in: int) -> str:
        """See `Storage`."""
        return "MXFP4"

    def entries(self, module: str, n_out: int, n_in: int) -> tuple[Entry, ...]:
        """See `Storage`."""
        return (
            Entry(f"{module}.weight_packed", "U8", (n_out, n_in // 2)),
            Entry(f"{module}.weight_scale", "U8", (n_out, n_in // 32)),
        )

    def tensors(self, rows: Tensor, n_in: int) -> tuple[Tensor, ...]:
        """See `Storage`."""
        blocks = rows.view(-1, 17)
        codes = split_nibbles(blocks[:, 1:], 16).view(len(rows), n_in)
        return _pairs(codes), blocks[:, 0].reshape(len(rows), -1)

    def packed(self, stored: Mapping[str, Tensor], n_in: int) -> Tensor:
        """See `Storage`."""
        codes = join_nibbles(_single(stored["weight_packed"]).view(-1, 32), 16)
        return torch.cat([stored["weight_scale"].view(-1, 1), codes], 1).view(-1, n_in // 32 * 17)


@dataclass(frozen=True, slots=True)
class Nvfp4:
    """compressed-tensors `nvfp4-pack-quantized`.

    `weight_packed` U8 [out, in / 2] as in `Mxfp4`, `weight_scale` F8_E4M3 [out, in / 16], and
    `weight_global_scale` F32 [1], which divides. With `scales_inputs` also `INPUT`.
    """

    scales_inputs: bool = False
    suffixes: Sequence[str] = ("weight_packed", "weight_scale", "weight_global_scale")

    def block_format(self, n_in: int) -> str:
        """See `Storage`."""
        return nvfp4.name_of(n_in)

    def entries(self, module: str, n_out: int, n_in: int) -> tuple[Entry, ...]:
        """See `Storage`."""
        return (
            Entry(f"{module}.weight_packed", "U8", (n_out, n_in // 2)),
            Entry(f"{module}.weight_scale", "F8_E4M3", (n_out, n_in // 16)),
            Entry(f"{module}.weight_global_scale", "F32", (1,)),
            *((Entry(f"{module}.{INPUT}", "F32", (1,)),) if self.scales_inputs else ()),
        )

    def tensors(self, rows: Tensor, n_in: int) -> tuple[Tensor, ...]:
        """See `Storage`."""
        numbers, scales, nibbles = nvfp4.split(rows.view(len(rows), -1), n_in)
        return _pairs(nibbles), scales.view(torch.float8_e4m3fn), numbers[:1].contiguous()

    def packed(self, stored: Mapping[str, Tensor], n_in: int) -> Tensor:
        """See `Storage`."""
        codes, scales = _single(stored["weight_packed"]), stored["weight_scale"].view(torch.uint8)
        return nvfp4.join(stored["weight_global_scale"], scales, codes)


def decode(storage: Storage, stored: Mapping[str, Tensor], n_in: int) -> Tensor:
    """What loaders of a folder make of a module's tensors, in their precision: f32 [out, in]."""
    if isinstance(storage, GptqIntegers | AwqIntegers):  # in f16, whatever the checkpoint is in
        return groups.decode(storage.fmt, *storage.integers(stored, n_in)).float()
    return formats.dequantize(storage.block_format(n_in), storage.packed(stored, n_in))


def _pairs(codes: Tensor) -> Tensor:
    """u8 [n, k] of 4 bits -> [n, k / 2]: the even one in the low nibble."""
    return codes[:, 0::2] | codes[:, 1::2] << 4


def _single(packed: Tensor) -> Tensor:
    """The inverse of `_pairs`."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(1)
