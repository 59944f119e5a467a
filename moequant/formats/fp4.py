"""MXFP4 and NVFP4: 4-bit floats (e2m1) with shared scales.

Codes 0..7 are 0, 1, 2, 3, 4, 6, 8, 12 (twice e2m1's values), codes 8..15 their negatives.

MXFP4, 32 weights in 17 bytes: e of a scale 2^(e - 128), then 16 bytes whose low nibbles are codes
0..15 and whose high nibbles are codes 16..31.

NVFP4, 64 weights in 36 bytes: four scales, unsigned e4m3 halved, one for each 16 weights, then
4 x 8 bytes: codes 0..7 in the low nibbles, 8..15 in the high ones.

Search: a block's error is a sum over its weights whatever its scale, so the scales next to the
one that just reaches the largest weight are tried, and the least error wins.
"""

from __future__ import annotations

import torch
from gguf import quants
from torch import Tensor

from moequant.formats.base import Effort, Format
from moequant.formats.kernel import kernel
from moequant.formats.layout import join_nibbles, split_nibbles
from moequant.formats.parts import Parts, Scalar

VALUES = [float(v) for v in quants.MXFP4.kvalues]
# Steps from the scale that puts the largest weight at the largest value or just above: in factors
# of 2, and in e4m3 codes. Upwards it may land on 8 or 6, where the values are finer.
MX_STEPS = {"fast": (1, 0), "default": (1, 0, -1), "best": (2, 1, 0, -1, -2, -3)}
NV_STEPS = {"fast": (-2, -1, 0, 1, 2, 5), "default": range(-3, 7), "best": range(-16, 14)}


def round_size(t: Tensor, top: tuple[float, float, float, float] = (4.0, 6.0, 8.0, 12.0)) -> Tensor:
    """The nearest of 0, 1, 2, 3, 4, 6, 8, 12 to t >= 0; `top` stands for the last four."""
    large = torch.where(t < 7, torch.where(t < 5, top[0], top[1]), torch.where(t < 10, top[2], top[3]))
    return torch.where(t < 4, t.round(), large)


def pack_codes(x: Tensor, inv: Tensor) -> Tensor:
    """x [n, 2 k], inv [n, 1] -> uint8 [n, k]: the code of weight i below that of i + k."""
    code = round_size(x.abs() * inv, (4.0, 5.0, 6.0, 7.0))
    low, high = torch.where(x < 0, code + 8, code).chunk(2, -1)
    return (low + 16 * high).to(torch.uint8)


def power(e: Tensor) -> Tensor:
    """int32 e in 1..254 -> f32 2^(e - 127)."""
    return (e << 23).view(torch.float32)


def ue4m3(code: Tensor) -> Tensor:
    """int32 0..126 -> f32, half of the unsigned e4m3 number."""
    return torch.where(code < 8, code * 2.0**-10, ((code << 20) + (119 << 23)).view(torch.float32))


@kernel
def fit_mx(x: Tensor, w: Tensor, steps: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """x, w [n, 32] -> int32 [n, 1] e, uint8 [n, 16] codes."""
    size = x.abs()
    reach = (size.amax(-1, keepdim=True).view(torch.int32) >> 23) - 2
    best_e, least = torch.zeros_like(reach), torch.full_like(x[:, :1], torch.inf)
    for step in steps:
        e = (reach + step).clamp(1, 253)
        scale, inv = power(e) * 0.5, power(255 - e)
        error = (w * (size - scale * round_size(size * inv)).square()).sum(-1, keepdim=True)
        better = error < least
        least, best_e = torch.where(better, error, least), torch.where(better, e, best_e)
    return best_e, pack_codes(x, power(255 - best_e))


@kernel
def fit_nv(x: Tensor, w: Tensor, steps: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """x, w [m, 16] -> int32 [m, 1] e4m3 codes, uint8 [m, 8] codes."""
    size = x.abs()
    reach = size.amax(-1, keepdim=True) * (1 / 6)
    normal = (reach.view(torch.int32) - (120 << 23)) >> 20
    middle = torch.where(reach < 2.0**-6, (reach * 512).to(torch.int32), normal)
    best_code, least = torch.zeros_like(middle), torch.full_like(x[:, :1], torch.inf)
    for step in steps:
        code = (middle + step).clamp(1, 126)
        scale = ue4m3(code)
        error = (w * (size - scale * round_size(size / scale)).square()).sum(-1, keepdim=True)
        better = error < least
        least, best_code = torch.where(better, error, least), torch.where(better, code, best_code)
    return best_code, pack_codes(x, 1 / ue4m3(best_code))


def encode_mx(x: Tensor, w: Tensor, effort: Effort) -> Tensor:
    """MXFP4: x, w [n, 32] -> uint8 [n, 17]."""
    e, codes = fit_mx(x, w, MX_STEPS[effort])
    return torch.cat([e.to(torch.uint8), codes], 1)


def encode_nv(x: Tensor, w: Tensor, effort: Effort) -> Tensor:
    """NVFP4: x, w [n, 64] -> uint8 [n, 36]."""
    scale, codes = fit_nv(x.reshape(-1, 16), w.reshape(-1, 16), tuple(NV_STEPS[effort]))
    return torch.cat([scale.view(-1, 4).to(torch.uint8), codes.view(-1, 32)], 1)


def pack_mx(parts: Parts) -> Tensor:
    """MXFP4: -> uint8 [n, 17]."""
    return torch.cat([parts.scale, join_nibbles(parts.codes, 16)], 1)


def unpack_mx(packed: Tensor) -> Parts:
    """MXFP4: uint8 [n, 17] -> its fields."""
    return _parts(packed[:, :1], split_nibbles(packed[:, 1:], 16))


def pack_nv(parts: Parts) -> Tensor:
    """NVFP4: -> uint8 [n, 36]."""
    return torch.cat([parts.scale, join_nibbles(parts.codes, 8)], 1)


def unpack_nv(packed: Tensor) -> Parts:
    """NVFP4: uint8 [n, 36] -> its fields."""
    return _parts(packed[:, :4], split_nibbles(packed[:, 4:], 8))


def _parts(scale: Tensor, codes: Tensor) -> Parts:
    d = torch.ones((len(codes), 1), dtype=torch.float16, device=codes.device)
    return Parts(codes, scale, codes[:, :0], d, d[:, :0])


def _mx_scales() -> tuple[float, ...]:
    """2^(e - 128) for all e; 2^-128 and 2^-127 are subnormal."""
    return tuple(2.0 ** (e - 128) for e in range(256))


def _nv_scales() -> tuple[float, ...]:
    """Bit 7 is no sign: it belongs to the exponent. 127 is e4m3's NaN, and means 0 here."""
    code = torch.arange(256, dtype=torch.int32)
    return tuple(torch.where(code == 127, 0.0, ue4m3(code & 127)).tolist())


# Codes 0 and 8 are 0 and -0; the largest and smallest scales would lose weights to f32's range.
VIEW_MX = Scalar(
    32, tuple(VALUES), unpack_mx, pack_mx, range(16), _mx_scales(), range(1, 254), stores_d=False
)
VIEW_NV = Scalar(16, tuple(VALUES), unpack_nv, pack_nv, range(16), _nv_scales(), range(127), stores_d=False)
MXFP4 = Format("MXFP4", 39, 32, 17, encode_mx, VIEW_MX.decode, view=VIEW_MX)
NVFP4 = Format("NVFP4", 40, 64, 36, encode_nv, VIEW_NV.decode, view=VIEW_NV)
