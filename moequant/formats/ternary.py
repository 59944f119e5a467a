"""TQ2_0 and TQ1_0: every weight is -d, 0 or d.

TQ2_0, 256 weights in 66 bytes: 2 x 32 bytes, byte i of each holds weights i, i + 32, i + 64 and
i + 96 of 128 as 2-bit digits, lowest first; f16 d. A digit is the weight's sign plus 1.

TQ1_0, 256 weights in 54 bytes: 32 bytes of 5 digits (weights i, i + 32, …), 16 of 5 (160 + i,
176 + i, …) and 4 of 4 (240 + i, …) in base 3, highest first; f16 d. A byte holds such a number
of 5 digits as the least b with floor(3^5 · b / 256) equal to it.

Search: for the weights beyond a threshold, the best d is their mean size, a/b with
a = sum(w·|x|) and b = sum(w) over them, which saves a²/b. Thresholds around the mean size of
the block are compared; then d/2 is the threshold, by which all codes are nearest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moequant.formats.base import Effort, Format
from moequant.formats.codebook import ratio
from moequant.formats.kernel import kernel
from moequant.formats.layout import half_at, half_bytes, join_pairs, split_pairs
from moequant.formats.parts import Parts, Scalar, count_up

# Thresholds in mean sizes; one refit brings nearly all blocks from 0.8 to their best.
THRESHOLDS: dict[Effort, tuple[float, ...]] = {
    "fast": (0.8,),
    "default": (0.8,),
    "best": (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.4, 1.7, 2.0, 2.5, 3.0, 4.0, 6.0, 9.0),
}
# TQ1_0's runs of bytes: first weight, digits a byte, bytes (and weights from one digit to the next).
RUNS = ((0, 5, 32), (160, 5, 16), (240, 4, 4))


def beyond(x: Tensor, w: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """x >= 0, w [n, 256], threshold [n, 1] -> a, b [n, 1]."""
    large = torch.where(x > threshold, w, 0.0)
    return (large * x).sum(-1, keepdim=True), large.sum(-1, keepdim=True)


@kernel
def fit(x: Tensor, w: Tensor, thresholds: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """x, w [n, 256] -> d f16 [n, 1], digits uint8 [n, 256] of 0, 1, 2."""
    size = x.abs()
    mean = size.mean(-1, keepdim=True)
    d = saved = torch.zeros_like(mean)
    for threshold in thresholds:
        a, b = beyond(size, w, mean * threshold)
        new = ratio(a, b)
        d = torch.where(a * new > saved, new, d)
        saved = torch.maximum(a * new, saved)
    d = ratio(*beyond(size, w, d * 0.5))
    half = d.clamp(0, 65504.0).to(torch.float16)
    middle = half.to(torch.float32) * 0.5
    return half, torch.where(x > middle, 2.0, torch.where(x < -middle, 0.0, 1.0)).to(torch.uint8)


def pack_tq2(parts: Parts) -> Tensor:
    """TQ2_0: -> uint8 [n, 66]."""
    return torch.cat([join_pairs(parts.codes), half_bytes(parts.d)], 1)


def unpack_tq2(packed: Tensor) -> Parts:
    """TQ2_0: uint8 [n, 66] -> its fields."""
    return _parts(split_pairs(packed[:, :64]), half_at(packed, 64))


def pack_tq1(parts: Parts) -> Tensor:
    """TQ1_0: -> uint8 [n, 54]."""
    runs = []
    for first, count, width in RUNS:
        run = parts.codes[:, first : first + count * width].view(-1, count, width)
        powers = 3 ** (4 - torch.arange(count, device=run.device, dtype=torch.int32))
        number = (run.to(torch.int32) * powers[:, None]).sum(1)
        runs.append(((number * 256 + 242) // 243).to(torch.uint8))
    return torch.cat([*runs, half_bytes(parts.d)], 1)


def unpack_tq1(packed: Tensor) -> Parts:
    """TQ1_0: uint8 [n, 54] -> its fields."""
    digits = []
    for at, (_, count, width) in zip((0, 32, 48), RUNS, strict=True):
        powers = 3 ** torch.arange(count, device=packed.device)[:, None]
        rest = packed[:, None, at : at + width].to(torch.int32) * powers & 255
        digits.append((rest * 3 >> 8).flatten(1).to(torch.uint8))
    return _parts(torch.cat(digits, 1), half_at(packed, 52))


def encode_tq2(x: Tensor, w: Tensor, effort: Effort) -> Tensor:
    """TQ2_0: x, w [n, 256] -> uint8 [n, 66]."""
    d, codes = fit(x, w, THRESHOLDS[effort])
    return pack_tq2(_parts(codes, d))


def encode_tq1(x: Tensor, w: Tensor, effort: Effort) -> Tensor:
    """TQ1_0: x, w [n, 256] -> uint8 [n, 54]."""
    d, codes = fit(x, w, THRESHOLDS[effort])
    return pack_tq1(_parts(codes, d))


def _parts(codes: Tensor, d: Tensor) -> Parts:
    scale = torch.zeros((len(codes), 1), dtype=torch.uint8, device=codes.device)
    return Parts(codes, scale, codes[:, :0], d, d[:, :0])


VIEW_TQ1 = Scalar(256, count_up(-1, 1), unpack_tq1, pack_tq1, range(3))
VIEW_TQ2 = Scalar(256, count_up(-1, 2), unpack_tq2, pack_tq2, range(3))
TQ1_0 = Format("TQ1_0", 34, 256, 54, encode_tq1, VIEW_TQ1.decode, view=VIEW_TQ1)
TQ2_0 = Format("TQ2_0", 35, 256, 66, encode_tq2, VIEW_TQ2.decode, view=VIEW_TQ2)
