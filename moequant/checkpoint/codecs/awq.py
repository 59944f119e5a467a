"""AWQ in gemm order, and Quark's integers of 4 bits: stored [in, out], eight outputs to a word.

    weight[out, in] = (code - zero point) · scale of its group

| part | dtype | shape |
|---|---|---|
| qweight | I32 | [in, out / 8] |
| qzeros | I32 | [groups, out / 8] |
| scales | F16 or BF16 | [groups, out] |

Nibble i of a word, lowest first, is output 0, 2, 4, 6, 1, 3, 5, 7 of its eight; Quark packs them in their
order where its config says so, calls the parts `weight`, `weight_zero_point` and `weight_scale`, and has
codes with a sign, as two's complement, where it says int4. References: AutoAWQ's `WQLinear_GEMM`, amd-quark
0.13 `Pack_4_bits`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moequant.checkpoint.codecs.base import read_part
from moequant.checkpoint.codecs.bits import unpack
from moequant.checkpoint.codecs.integers import Integers, centred
from moequant.checkpoint.codecs.scales import numbers
from moequant.values import Stored, TensorRef

BITS = 4
_NIBBLE_OF = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which nibble holds output 0, 1, … of a word."""


@dataclass(frozen=True, slots=True)
class Awq:
    """Parts `weight`, `zero_point` and `scale`; `group` weights share a scale.

    `symmetric` is what the config says, for `as_shipped`: decoding goes by the tensors. `reordered` and
    `signed` are how a word holds its eight. Without `zero_point` all zero points are 0.
    The words of a whole matrix are read for any rows: they lie across it. F32, exact.
    """

    group: int
    symmetric: bool = False
    reordered: bool = True
    signed: bool = False
    name: str = "awq"

    def decode(self, stored: Stored, index: int | None, rows: range | None) -> Tensor:
        """See `Codec`. CheckpointError for a scale that is no number."""
        assert rows is not None
        return self.integers(stored, index, rows).values()

    def integers(self, stored: Stored, index: int | None, rows: range) -> Integers:
        """The same as whole numbers and scales."""
        codes = self._outputs(stored.parts["weight"], rows)
        ref = stored.parts.get("zero_point")
        zeros = (8 if self.signed else 0) if ref is None else self._outputs(ref, rows)
        scales = numbers(stored.parts["scale"])[:, rows.start : rows.stop].T
        return Integers(centred(codes, zeros, self.group, None), scales, self.group)

    def _outputs(self, ref: TensorRef, rows: range) -> Tensor:
        """uint8 [len(rows), n] of words [n, out / 8]; those with a sign plus 8."""
        begin = rows.start // 8
        words = read_part(ref)[:, begin : -(-rows.stop // 8)]
        codes = unpack(words, BITS)
        if self.reordered:
            codes = codes.view(len(words), -1, 8)[..., torch.tensor(_NIBBLE_OF)].view(len(words), -1)
        found = codes[:, rows.start - begin * 8 :][:, : len(rows)].T.contiguous()
        return found.bitwise_xor_(8) if self.signed else found
