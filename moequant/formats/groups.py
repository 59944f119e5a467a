"""Integers of 2 to 8 bits in groups, as safetensors folders hold them: weight = code · scale, symmetric.

A scale serves `group` weights of a row (or the whole row) and is stored in 16 bits. `of_rows` is the
same as a block format, so that one search, one rounding and one reader serve these as they serve
ggml's types: a block is a group, its scale first. `split` and `pack` make of it what files hold.

The search puts the largest weight of a group at several places of the code range, solves the
scale in closed form for the codes that follow, rounds it to what will be stored, and keeps the
scale with the least importance-weighted squared error.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from moequant.errors import FormatError
from moequant.formats.base import NO_GGML_TYPE, Effort, Format
from moequant.formats.kernel import kernel
from moequant.formats.layout import better, inverse
from moequant.formats.parts import Parts, Scalar, count_up

GROUPS = (32, 64, 128, -1)
"""Group sizes that loaders have kernels for; -1 is one scale a row."""

BITS = (2, 3, 4, 5, 6, 7, 8)

SCALES = {
    "BF16": (torch.bfloat16,),
    "F16": (torch.float16,),
    "BF16_F16": (torch.bfloat16, torch.float16),
}
_NAME = re.compile(r"INT([2-8])_G([1-9]\d*)_(" + "|".join(SCALES) + ")")


@dataclass(frozen=True, slots=True)
class GroupFormat:
    """Codes of `bits` bits, a scale for `group` weights (-1: a row).

    A scale is rounded to each of `scale_dtypes` in turn and stored as the last: a file of
    bf16 scales and one of the same scales in f16 then hold the same codes.
    """

    bits: int
    group: int
    scale_dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)

    @property
    def name(self) -> str:
        """How plans and reports call it: INT4_G128, INT8_CHANNEL."""
        return f"INT{self.bits}_" + ("CHANNEL" if self.group == -1 else f"G{self.group}")

    @property
    def scale_dtype(self) -> torch.dtype:
        """What the file stores scales as."""
        return self.scale_dtypes[-1]

    @property
    def low(self) -> int:
        """The smallest code."""
        return -(1 << self.bits - 1)

    @property
    def high(self) -> int:
        """The largest code."""
        return (1 << self.bits - 1) - 1

    def words(self, n_in: int) -> int:
        """Words of 32 bits that hold a row of codes, end to end."""
        return -(-n_in * self.bits // 32)

    def size(self, n_in: int) -> int:
        """Weights that share a scale in rows of `n_in`."""
        return n_in if self.group == -1 else self.group

    def groups(self, n_in: int) -> int:
        """Scales in a row of `n_in` weights; FormatError when groups do not divide it."""
        if n_in % self.size(n_in):
            raise FormatError(f"{self.name} needs rows of a multiple of {self.group}, not {n_in}")
        return n_in // self.size(n_in)

    def storable(self, scale: Tensor) -> Tensor:
        """f32 scales as the file will hold them (0 stays 0, nothing else becomes 0), f32."""
        return storable(scale, self.scale_dtypes, -self.low)

    def of_rows(self, n_in: int) -> Format:
        """The block format of rows of `n_in`; `formats.get` knows it by its name, INT4_G128_BF16."""
        self.groups(n_in)
        return _block_format(GroupFormat(self.bits, self.size(n_in), self.scale_dtypes))


def storable(scale: Tensor, dtypes: tuple[torch.dtype, ...], most: int = 1) -> Tensor:
    """f32 scales rounded to each of `dtypes` in turn (0 stays 0, nothing else becomes 0), f32.

    So small that a code of size `most` times a scale is a number of each of them too, as loaders multiply.
    """
    for dtype in dtypes:
        limit = torch.finfo(dtype).max / most
        tiny = torch.sign(scale) * (2.0**-24 if dtype == torch.float16 else 2.0**-126)
        near = scale.clamp(-limit, limit).to(dtype).to(torch.float32)
        scale = torch.where(near.abs() < tiny.abs(), tiny, near)
    return scale


def named(name: str) -> Format | None:
    """The block format of that name, None when it is no name of one."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    bits, group, scales = found.groups()
    return _block_format(GroupFormat(int(bits), int(group), SCALES[scales]))


# Where in the codes, before rounding, the weight of largest size lands, most useful first: chosen one by one
# for the least mean error of experts of a trained model, normal and heavy-tailed weights, all group sizes.
# Mostly on the side that has one code more, so scales are of both signs: 10 % less error at 4 bits.
_LANDINGS: dict[int, tuple[float, ...]] = {
    4: (-8.6, -10.4, -8.0, -9.2, -14.0, 7.2, 9.0, -11.3, -8.3, -9.8, -17.9, 10.2, -7.6, -24.0, 7.6, 12.0),
    7: (-64.0, -63.0, -62.0, -61.0, -60.0, -75.0, -59.0, -65.0, -58.0, -57.0, -56.0, -95.0),  # as of 8 bits
    8: (-128.0, -127.0, -126.0, -125.0, -124.0, -150.0, -123.0, -129.0, -122.0, -121.0, -120.0, -190.0),
}
# Other widths: those of 4 bits, as multiples of the longer side of the range.
_SIDES = (
    *(-1.06, -1.3, -1.0, -1.15, -1.75, 0.9, 1.12, -1.41, -1.04, -1.22),
    *(-2.24, 1.27, -0.95, -3.0, 0.95, 1.5),
)
_TRIED: dict[Effort, int] = {"fast": 4, "default": 12, "best": 16}
"""How many of them each effort tries."""


@cache
def _block_format(fmt: GroupFormat) -> Format:
    """Blocks of `fmt.group` weights: the scale's two bytes, then the codes as `pack` has them."""
    group, dtype = fmt.group, fmt.scale_dtype

    def pack_block(parts: Parts) -> Tensor:
        scale = parts.d.to(dtype).flatten().contiguous().view(-1, 1).view(torch.uint8)
        return torch.cat([scale, _pack_bytes(parts.codes, fmt.bits)], 1)

    def unpack_block(blocks: Tensor) -> Parts:
        codes, scale = _unpack_bytes(blocks[:, 2:], fmt.bits, group), blocks[:, :2].clone().view(dtype)
        return Parts(codes, torch.zeros_like(codes[:, :1]), codes[:, :0], scale, scale[:, :0])

    def encode(x: Tensor, w: Tensor, effort: Effort) -> Tensor:
        known = _LANDINGS.get(fmt.bits) or tuple(-fmt.low * side for side in _SIDES)
        landings = torch.tensor(known[: _TRIED[effort]], dtype=torch.float32, device=x.device)
        scale = search(x, w, landings, fmt)[:, None]
        codes = torch.where(scale != 0, x / scale, 0.0).round_().clamp_(fmt.low, fmt.high) - fmt.low
        none = scale[:, :0]
        return pack_block(Parts(codes.to(torch.uint8), scale, none, scale, none))

    def decode_block(blocks: Tensor) -> Tensor:
        codes, scales = split(fmt, blocks, group)
        return decode(
            fmt, codes, scales.to(fmt.scale_dtypes[0])
        ).float()  # as a model in its own precision does

    view = Scalar(
        sub=group,
        levels=count_up(fmt.low, fmt.high),
        unpack=unpack_block,
        pack=pack_block,
        codes=range(1 << fmt.bits),
        storable=fmt.storable,
    )
    scales = next(name for name, dtypes in SCALES.items() if dtypes == fmt.scale_dtypes)
    limit = min(torch.finfo(each).max for each in fmt.scale_dtypes)
    size = dtype.itemsize + -(-group * fmt.bits // 8)
    return Format(
        f"{fmt.name}_{scales}", NO_GGML_TYPE, group, size, encode, decode_block, limit=limit, view=view
    )


def split(fmt: GroupFormat, data: Tensor, n_in: int) -> tuple[Tensor, Tensor]:
    """u8 [..., row_bytes] of `fmt.of_rows(n_in)` -> codes i8 [..., n_in], scales [..., groups]."""
    blocks = data.reshape(*data.shape[:-1], fmt.groups(n_in), -1)
    scales = blocks[..., :2].contiguous().view(fmt.scale_dtype)[..., 0]
    codes = _unpack_bytes(blocks[..., 2:], fmt.bits, fmt.size(n_in)).flatten(-2)
    return (codes.to(torch.int16) + fmt.low).to(torch.int8), scales


def join(fmt: GroupFormat, codes: Tensor, scales: Tensor) -> Tensor:
    """The inverse of `split`."""
    unsigned = (codes.to(torch.int16) - fmt.low).to(torch.uint8)
    packed = _pack_bytes(unsigned.reshape(*scales.shape, -1), fmt.bits)
    return torch.cat([scales[..., None].contiguous().view(torch.uint8), packed], -1).flatten(-2)


def decode(fmt: GroupFormat, codes: Tensor, scales: Tensor) -> Tensor:
    """code · scale in the scale's own precision, as compressed-tensors computes it: [..., in]."""
    by_group = codes.to(scales.dtype).reshape(*scales.shape, fmt.size(codes.shape[-1]))
    return (by_group * scales[..., None]).flatten(-2)


def pack(codes: Tensor, bits: int) -> Tensor:
    """i8 [..., in] -> i32 [..., ceil(in · bits / 32)]: code + 2^(bits-1), lowest bits first, rest 0."""
    unsigned = (codes.to(torch.int16) + (1 << bits - 1)).to(torch.uint8)
    packed = _pack_bytes(unsigned, bits)
    return torch.nn.functional.pad(packed, (0, -packed.shape[-1] % 4)).contiguous().view(torch.int32)


def unpack(packed: Tensor, bits: int, n_in: int) -> Tensor:
    """i32 [..., words] -> i8 [..., n_in]; the inverse of `pack`."""
    unsigned = _unpack_bytes(packed.contiguous().view(torch.uint8), bits, n_in)
    return (unsigned.to(torch.int16) - (1 << bits - 1)).to(torch.int8)


def _pack_bytes(unsigned: Tensor, bits: int) -> Tensor:
    """u8 [..., n] of `bits` bits -> u8 [..., ceil(n · bits / 8)], end to end, lowest bits first."""
    if bits == 8:
        return unsigned
    if bits == 4:
        even = torch.nn.functional.pad(unsigned, (0, unsigned.shape[-1] % 2))
        return even[..., 0::2] | even[..., 1::2] << 4
    stream = (unsigned[..., None] >> _counting(bits, unsigned) & 1).flatten(-2)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[-1] % 8)).view(*unsigned.shape[:-1], -1, 8)
    packed: Tensor = (stream << _counting(8, unsigned)).sum(-1, dtype=torch.uint8)
    return packed


def _unpack_bytes(packed: Tensor, bits: int, n: int) -> Tensor:
    """The inverse of `_pack_bytes`: u8 [..., n]."""
    if bits == 8:
        return packed[..., :n]
    if bits == 4:
        return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)[..., :n]
    stream = (packed[..., None] >> _counting(8, packed) & 1).flatten(-2)[..., : n * bits]
    stream = stream.reshape(*packed.shape[:-1], n, bits)
    codes: Tensor = (stream << _counting(bits, packed)).sum(-1, dtype=torch.uint8)
    return codes


def _counting(count: int, like: Tensor) -> Tensor:
    """u8: 0, 1, ... below `count`."""
    return torch.arange(count, dtype=torch.uint8, device=like.device)


@kernel
def search(x: Tensor, w: Tensor, landings: Tensor, fmt: GroupFormat) -> Tensor:
    """The best storable scale of each group: x, w [n, group] -> f32 [n]."""
    low, high = x.amin(-1), x.amax(-1)
    by = inverse(torch.where(high > -low, high, low))
    fit: tuple[Tensor, ...] = (torch.zeros_like(by), torch.zeros_like(by))
    for landing in landings.unbind():
        fit = better(fit, _solve(x, w, by * landing, fmt))
    return better(fit, _solve(x, w, inverse(fit[1]), fmt))[1]


def _solve(x: Tensor, w: Tensor, by: Tensor, fmt: GroupFormat) -> tuple[Tensor, Tensor]:
    """(error less a constant, scale) after codes x · by: the scale that suits those codes best, rounded."""
    codes = (x * by[..., None]).round().clamp(fmt.low, fmt.high)
    wc = w * codes
    b, p = (wc * x).sum(-1), (wc * codes).sum(-1)
    s = fmt.storable(b * inverse(p))
    return s * (s * p - 2 * b), s
