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
from moequant.formats.layout import half_bytes, read_half

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


def fit(x: Tensor, w: Tensor, thresholds: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """x, w [n, 256] -> d f16 [n, 1], digits f32 [n, 256] of 0, 1, 2."""
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
    return half, torch.where(x > middle, 2.0, torch.where(x < -middle, 0.0, 1.0))


@kernel
def fit_tq2(x: Tensor, w: Tensor, thresholds: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """x, w [n, 256] -> d f16 [n, 1], uint8 [n, 2, 32]."""
    d, digits = fit(x, w, thresholds)
    first, second, third, fourth = digits.view(-1, 2, 4, 32).unbind(2)
    return d, (first + 4 * second + 16 * third + 64 * fourth).to(torch.uint8)


@kernel
def fit_tq1(x: Tensor, w: Tensor, thresholds: tuple[float, ...]) -> tuple[Tensor, list[Tensor]]:
    """x, w [n, 256] -> d f16 [n, 1], uint8 [n, 32], [n, 16] and [n, 4]."""
    d, digits = fit(x, w, thresholds)
    parts = []
    for first, count, width in RUNS:
        run = digits[:, first : first + count * width].view(-1, count, width)
        number = torch.zeros_like(run[:, 0])
        for i in range(count):
            number = number + run[:, i] * 3.0 ** (4 - i)
        parts.append(torch.ceil(number * (256 / 243)).to(torch.uint8))
    return d, parts


def encode_tq2(x: Tensor, w: Tensor, effort: Effort) -> Tensor:
    """TQ2_0: x, w [n, 256] -> uint8 [n, 66]."""
    d, codes = fit_tq2(x, w, THRESHOLDS[effort])
    return torch.cat([codes.flatten(1), half_bytes(d)], 1)


def encode_tq1(x: Tensor, w: Tensor, effort: Effort) -> Tensor:
    """TQ1_0: x, w [n, 256] -> uint8 [n, 54]."""
    d, parts = fit_tq1(x, w, THRESHOLDS[effort])
    return torch.cat([*parts, half_bytes(d)], 1)


def decode_tq2(packed: Tensor) -> Tensor:
    """TQ2_0: uint8 [n, 66] -> f32 [n, 256]."""
    shifts = torch.arange(0, 8, 2, device=packed.device).to(torch.uint8)
    digit = packed[:, :64].reshape(-1, 2, 1, 32) >> shifts[:, None] & 3
    return read_half(packed, 64) * (digit.to(torch.float32).flatten(1) - 1)


def decode_tq1(packed: Tensor) -> Tensor:
    """TQ1_0: uint8 [n, 54] -> f32 [n, 256]."""
    digits = []
    for at, (_, count, width) in zip((0, 32, 48), RUNS, strict=True):
        powers = 3 ** torch.arange(count, device=packed.device)[:, None]
        rest = packed[:, None, at : at + width].to(torch.int32) * powers & 255
        digits.append((rest * 3 >> 8).flatten(1))
    return read_half(packed, 52) * (torch.cat(digits, 1).to(torch.float32) - 1)


TQ1_0 = Format("TQ1_0", 34, 256, 54, encode_tq1, decode_tq1)
TQ2_0 = Format("TQ2_0", 35, 256, 66, encode_tq2, decode_tq2)
