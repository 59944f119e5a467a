"""Quantized weights as transformers misreads them, to tell its mistakes from ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moequant.checkpoint import load
from moequant.checkpoint.codecs.base import DTYPES
from moequant.checkpoint.codecs.nvfp4 import Nvfp4
from moequant.checkpoint.codecs.packed_int import PackedInt
from moequant.values import Weight


@dataclass(frozen=True, slots=True)
class Misreading:
    """What transformers does in words, whether it concerns a weight, and what it makes of one."""

    words: str
    concerns: Callable[[Weight], bool]
    load: Callable[[Weight], Tensor]


def _has_number(weight: Weight) -> bool:
    """Whether transformers 5.24 drops a number of each matrix: of experts as compressed-tensors has them."""
    codecs = [stored.codec for stored in weight.origin.stored]
    return weight.is_expert and all(isinstance(codec, Nvfp4) and codec.divides for codec in codecs)


def _without_number(weight: Weight) -> Tensor:
    values = load(weight)
    if not _has_number(weight):
        return values
    numbers = [
        stored.codec.multiplier(stored, None)
        for stored in weight.origin.stored
        if isinstance(stored.codec, Nvfp4)
    ]
    return values.float() / torch.stack(numbers).view(-1, *[1] * (values.ndim - 1))


def _is_packed(weight: Weight) -> bool:
    """Whether compressed-tensors multiplies integers by their scales, in the scales' precision."""
    return any(isinstance(stored.codec, PackedInt) for stored in weight.origin.stored)


def _rounded(weight: Weight) -> Tensor:
    values = load(weight)
    scales = {stored.parts["scale"].dtype for stored in weight.origin.stored if "scale" in stored.parts}
    return values.to(DTYPES[scales.pop()]).float() if _is_packed(weight) and len(scales) == 1 else values


MISREADINGS = (
    Misreading("drops the number of NVFP4's experts", _has_number, _without_number),
    Misreading("rounds decoded integers to the precision of their scales", _is_packed, _rounded),
)
