"""Whole numbers and their scales: what every integer form decodes to, and what ggml's types can take over."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moequant.checkpoint.codecs.scales import scaled


@dataclass(frozen=True, slots=True)
class Integers:
    """weight[r, c] = codes[r, c] · scales[r, group of c].

    `codes` i16 [n, in], the zero point already taken off; `scales` f32 [n, groups], each for `columns`
    weights in turn, or for those that `group_of` i64 [in] names.
    """

    codes: Tensor
    scales: Tensor
    columns: int
    group_of: Tensor | None = None

    def values(self) -> Tensor:
        """f32 [n, in]: one product each, exact when scales were stored in 16 bits."""
        values = self.codes.to(torch.float32)
        if self.group_of is not None:
            return values.mul_(self.scales[:, self.group_of])
        return scaled(values, self.scales, self.columns)

    def block_scales(self, block: int) -> Tensor | None:
        """f32 [n, in / block]: the scale of each block; None when blocks do not share one."""
        n_in = self.codes.shape[1]
        if n_in % block:
            return None
        group_of = self.group_of
        if group_of is None:
            group_of = torch.arange(n_in) // self.columns
        blocks = group_of.view(-1, block)
        return self.scales[:, blocks[:, 0]] if (blocks == blocks[:, :1]).all() else None


def centred(codes: Tensor, zeros: Tensor | int, columns: int, group_of: Tensor | None) -> Tensor:
    """uint8 codes [n, in] less the zero points: one for all, or uint8 [n, groups] laid out as scales are."""
    signed = codes.to(torch.int16)
    if isinstance(zeros, int):
        return signed.sub_(zeros)
    each = zeros.to(torch.int16)
    if group_of is not None:
        return signed.sub_(each[:, group_of])
    return signed.sub_(each.repeat_interleave(columns, 1)[:, : signed.shape[1]])
