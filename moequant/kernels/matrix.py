"""Packed weights as a kernel takes them: bytes of the file, and scales where the file keeps them apart."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moequant import formats
from moequant.errors import FormatError

INTEGERS = {"INT4": 4, "INT8": 8}
"""compressed-tensors `pack-quantized`: little-endian codes along `in`, offset by half their range."""

KERNEL_FORMATS = (*(name for name in formats.FORMATS if name not in ("F32", "F16", "BF16")), *INTEGERS)
"""Formats that have a kernel: all that pack weights."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """E matrices of [out, in] in one format: shape (E, out, in), E = 1 when dense.

    `data` u8 [E, out, row_bytes]. ggml formats keep their scales in `data`; INT4 and INT8 have
    `scales` (any float type) [E, out, groups], each for in / groups neighbouring weights. A kernel knows
    nothing of `factors` f32 [E]: its product is to be multiplied by them (the one number of NVFP4).
    """

    format: str
    shape: tuple[int, int, int]
    data: Tensor
    scales: Tensor | None = None
    factors: Tensor | None = None

    def __post_init__(self) -> None:
        experts, rows, n_in = self.shape
        if self.format in INTEGERS:
            self._check_groups()
            row_bytes = n_in * INTEGERS[self.format] // 8
        else:
            row_bytes = formats.get(self.format).row_bytes(n_in)
        if str(self.data.dtype) != "torch.uint8" or tuple(self.data.shape) != (experts, rows, row_bytes):
            raise FormatError(
                f"{self.format} {list(self.shape)} lies in u8 {[experts, rows, row_bytes]}, "
                f"not {self.data.dtype} {list(self.data.shape)}"
            )

    def _check_groups(self) -> None:
        experts, rows, n_in = self.shape
        if self.scales is None or tuple(self.scales.shape[:2]) != (experts, rows):
            raise FormatError(f"{self.format} needs scales [{experts}, {rows}, groups]")
        groups = self.scales.shape[2]
        if n_in % 32 or n_in % groups or (n_in // groups) % 32:
            raise FormatError(
                f"{self.format}: rows of {n_in} in {groups} groups; groups of a multiple of 32 are read"
            )

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads: codes and scales."""
        scales = 0 if self.scales is None else self.scales.numel() * self.scales.element_size()
        return self.data.numel() + scales

    def experts(self, first: int, last: int) -> Matrix:
        """Experts first:last, as views."""
        scales = None if self.scales is None else self.scales[first:last]
        factors = None if self.factors is None else self.factors[first:last]
        return Matrix(self.format, (last - first, *self.shape[1:]), self.data[first:last], scales, factors)

    def to(self, device: str) -> Matrix:
        """The same on another device."""
        scales = None if self.scales is None else self.scales.to(device)
        factors = None if self.factors is None else self.factors.to(device)
        return Matrix(self.format, self.shape, self.data.to(device), scales, factors)

    def decode(self) -> Tensor:
        """f32 [E, out, in], by moequant's decoders in torch."""
        if self.format not in INTEGERS:
            values = formats.dequantize(self.format, self.data)
            return values if self.factors is None else values * self.factors[:, None, None]
        assert self.scales is not None
        bits = INTEGERS[self.format]
        if bits == 4:
            codes = (self.data[..., None] >> self.data.new_tensor([0, 4])) & 15
            codes = codes.flatten(-2)
        else:
            codes = self.data
        centered = codes.float() - (1 << (bits - 1))
        grouped = centered.view(*self.scales.shape, -1)
        decoded: Tensor = grouped * self.scales.float()[..., None]
        return decoded.flatten(-2)
