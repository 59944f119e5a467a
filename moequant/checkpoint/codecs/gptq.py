"""GPTQ: integers of 2, 3, 4 or 8 bits, stored [in, out].

    weight[out, in] = (code - zero point) · scale of its group

| part | dtype | shape |
|---|---|---|
| qweight | I32 | [in · bits / 32, out], lowest bits first along `in`; 32 codes of 3 bits in 3 words |
| qzeros | I32 | [groups, out · bits / 32] |
| scales | F16 or BF16 | [groups, out] |
| g_idx | I32 | [in], the group of each channel; absent: in turn |

`checkpoint_format` "gptq" (the first version) stores each zero point less one, "gptq_v2" as it is.
References: AutoGPTQ's and GPTQModel's `pack`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moequant.checkpoint.codecs.base import read_part
from moequant.checkpoint.codecs.bits import period, unpack
from moequant.checkpoint.codecs.integers import Integers, centred
from moequant.checkpoint.codecs.packed_int import groups
from moequant.checkpoint.codecs.scales import numbers
from moequant.values import Stored


@dataclass(frozen=True, slots=True)
class Gptq:
    """Parts `weight`, `zero_point`, `scale` and perhaps `g_idx`; `group` weights share a scale.

    `symmetric` and `act_order` are what the config says, for `as_shipped`: decoding goes by the tensors.
    The words of a whole matrix are read for any rows: they lie across it. F32, exact.
    """

    bits: int
    group: int
    less_one: bool
    symmetric: bool
    act_order: bool
    name: str = "gptq"

    def decode(self, stored: Stored, index: int | None, rows: range | None) -> Tensor:
        """See `Codec`. CheckpointError for a scale that is no number or a group that is not there."""
        assert rows is not None
        return self.integers(stored, index, rows).values()

    def integers(self, stored: Stored, index: int | None, rows: range) -> Integers:
        """The same as whole numbers and scales."""
        words = read_part(stored.parts["weight"])[:, rows.start : rows.stop].T
        codes = unpack(words, self.bits)[:, : stored.shape[-1]]
        scales = numbers(stored.parts["scale"])[:, rows.start : rows.stop].T
        group_of = groups(stored.parts["g_idx"], scales.shape[1]) if "g_idx" in stored.parts else None
        zeros = self._zeros(stored, rows)
        return Integers(centred(codes, zeros, self.group, group_of), scales, self.group, group_of)

    def _zeros(self, stored: Stored, rows: range) -> Tensor:
        """uint8 [len(rows), groups]."""
        span, count = period(self.bits, dense=True)
        begin = rows.start // count
        words = read_part(stored.parts["zero_point"])[:, begin * span : -(-rows.stop // count) * span]
        zeros = unpack(words, self.bits)[:, rows.start - begin * count :][:, : len(rows)]
        if self.less_one:  # 0 less one was stored as all ones
            zeros = zeros + 1 & (1 << self.bits) - 1
        return zeros.T.to(torch.uint8)
