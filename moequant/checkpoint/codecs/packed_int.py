"""compressed-tensors `pack-quantized`: integers of 2 to 8 bits in 32-bit words.

    weight = (code - zero point) · scale of its group

| part | dtype | shape |
|---|---|---|
| weight_packed | I32 | [out, words], code + 2^(bits-1), lowest bits first along `in` |
| weight_scale | BF16, F16 or F32 | [out, groups], or one a row, or one for all |
| weight_zero_point | I32 | [words, groups], packed along `out` in the same way; absent when symmetric |
| weight_g_idx | I32 | [in], the group of each column, where GPTQ reordered them |
| weight_shape | I64 | [2]: out and in |

Words are dense since compressed-tensors 0.20: 32 codes of 3, 5, 6 or 7 bits take as many words, and
straddle them. Older files hold as many whole codes in a word as fit. 3-D experts have E in front of all.
References: compressed-tensors 0.20 `pack_quantized`, and 0.13 for the older packing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moequant.checkpoint.codecs.base import damaged, read_part
from moequant.checkpoint.codecs.bits import period, unpack
from moequant.checkpoint.codecs.integers import Integers, centred
from moequant.checkpoint.codecs.scales import Grid
from moequant.values import Stored, TensorRef


@dataclass(frozen=True, slots=True)
class PackedInt:
    """Parts `weight`, `scale` in `scales.as_grid`'s form, perhaps `zero_point`, `g_idx` and `shape`.

    F32: a product of 8 bits and a 16-bit scale needs more than bf16 or f16 have, and is exact in f32.
    """

    bits: int
    dense: bool
    grid: Grid

    @property
    def name(self) -> str:
        """int4, for example."""
        return f"int{self.bits}"

    def decode(self, stored: Stored, index: int | None, rows: range | None) -> Tensor:
        """See `Codec`. CheckpointError for a scale that is no number, another shape, or a group too many."""
        assert rows is not None
        return self.integers(stored, index, rows).values()

    def integers(self, stored: Stored, index: int | None, rows: range) -> Integers:
        """The same as whole numbers and scales."""
        self._check_shape(stored)
        codes = unpack(read_part(stored.parts["weight"], index, rows), self.bits, self.dense)
        codes = codes[:, : stored.shape[-1]]
        scales = self.grid.read(stored.parts["scale"], index, rows)
        group_of = groups(stored.parts["g_idx"], scales.shape[1]) if "g_idx" in stored.parts else None
        zeros: Tensor | int = 1 << self.bits - 1
        if "zero_point" in stored.parts:
            zeros = self._zeros(stored.parts["zero_point"], index, rows)
        return Integers(
            centred(codes, zeros, self.grid.columns, group_of), scales, self.grid.columns, group_of
        )

    def _zeros(self, ref: TensorRef, index: int | None, rows: range) -> Tensor:
        """uint8 [len(rows), groups]: zero points with the offset of the codes."""
        if ref.dtype == "I8":  # of the tensor strategy: one, as it is
            return (self.grid.read(ref, index, rows) + (1 << self.bits - 1)).to(torch.uint8)
        span, count = period(self.bits, self.dense)
        begin = rows.start // count
        words = range(begin * span, min(-(-rows.stop // count) * span, ref.shape[-2]))
        found = unpack(read_part(ref, index, words).T, self.bits, self.dense).T
        return found[rows.start - begin * count :][: len(rows)]

    def _check_shape(self, stored: Stored) -> None:
        if "shape" in stored.parts:
            shape = read_part(stored.parts["shape"]).tolist()
            if tuple(shape) != stored.shape:
                expected = f"{list(stored.shape)} from the other tensors and the config"
                raise damaged(stored.parts["shape"].name, f"says {shape}, expected {expected}")


def groups(ref: TensorRef, count: int) -> Tensor:
    """i64 [in]: the group of each column. CheckpointError when one is not among `count`."""
    found = read_part(ref).to(torch.int64)
    if len(found) and not 0 <= int(found.min()) <= int(found.max()) < count:
        there = f"{int(found.min())} to {int(found.max())}"
        raise damaged(ref.name, f"has groups {there}, expected 0 to {count - 1}")
    return found
