"""int4 and int8 in groups, as safetensors folders hold them: weight = code · scale, symmetric.

A scale serves `group` weights of a row (or the whole row) and is stored in 16 bits. The three
steps are separate, so that a rounding with feedback can take the place of the second:

    search(fmt, weights, importance) -> scales      round_codes(fmt, weights, scales) -> codes
    pack(codes, bits) -> int32

The search puts the largest weight of a group at several places of the code range, solves the
scale in closed form for the codes that follow, rounds it to what will be stored, and keeps the
scale with the least importance-weighted squared error.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from moequant.errors import FormatError
from moequant.formats.base import Effort
from moequant.formats.kernel import TILE, kernel
from moequant.formats.layout import better, inverse

GROUPS = (32, 64, 128, -1)
"""Group sizes that loaders have kernels for; -1 is one scale a row."""

BITS = (4, 8)

log = logging.getLogger(__name__)


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

    @property
    def per_word(self) -> int:
        """Codes in an int32."""
        return 32 // self.bits

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
        for dtype in self.scale_dtypes:
            limit = torch.finfo(dtype).max
            tiny = torch.sign(scale) * (2.0**-24 if dtype == torch.float16 else 2.0**-126)
            near = scale.clamp(-limit, limit).to(dtype).to(torch.float32)
            scale = torch.where(near.abs() < tiny.abs(), tiny, near)
        return scale


# Where in the codes, before rounding, the weight of largest size lands, most useful first: chosen one by one
# for the least mean error of experts of a trained model, normal and heavy-tailed weights, all group sizes.
# Mostly on the side that has one code more, so scales are of both signs: 10 % less error at 4 bits.
_LANDINGS: dict[int, tuple[float, ...]] = {
    4: (-8.6, -10.4, -8.0, -9.2, -14.0, 7.2, 9.0, -11.3, -8.3, -9.8, -17.9, 10.2, -7.6, -24.0, 7.6, 12.0),
    8: (-128.0, -127.0, -126.0, -125.0, -124.0, -150.0, -123.0, -129.0, -122.0, -121.0, -120.0, -190.0),
}
_TRIED: dict[Effort, int] = {"fast": 4, "default": 12, "best": 16}
"""How many of them each effort tries."""


def search(
    fmt: GroupFormat,
    weights: Tensor,
    importance: Tensor | None = None,
    effort: Effort = "default",
    *,
    threads: int | None = None,
) -> Tensor:
    """Scales of weights [E, out, in] in `fmt.scale_dtype` [E, out, in / group], minimising sum w · (x - q)².

    importance [E, in], finite and above 0, is shared by the rows; None means all equal. FormatError
    names the first weight that is not finite or too large.
    """
    experts, rows, n_in = weights.shape
    shape = (rows, fmt.groups(n_in), fmt.size(n_in))
    if importance is not None and importance.shape != (experts, n_in):
        raise FormatError(
            f"importance of weights {list(weights.shape)} must be {[experts, n_in]}, not "
            f"{list(importance.shape)}"
        )
    device = weights.device
    landings = _landings(fmt, effort, device)
    tiles = max(1, rows * n_in // TILE[device.type])
    step = -(-rows // tiles)
    if rows * n_in < TILE[device.type] or not _compiles(fmt, (step, *shape[1:]), effort, device.type):
        step = max(1, TILE[device.type] // 4 // n_in)
    scales = torch.empty((experts, *shape[:2]), dtype=fmt.scale_dtype, device=device)

    def work(expert: int, first: int) -> None:
        x = weights[expert, first : first + step].to(torch.float32)
        _check(fmt, x, expert, first)
        count = len(x)
        if count < step and first:  # compiled kernels are for one size
            x = torch.cat([x, x.new_zeros((step - count, n_in))])
        w = x.new_ones(n_in) if importance is None else _weights(importance[expert], device)
        found = _search(x.view(-1, *shape[1:]), w.view(shape[1:]), landings, fmt)
        scales[expert, first : first + count] = found[:count].to(fmt.scale_dtype)

    _each(work, [(e, r) for e in range(experts) for r in range(0, rows, step)], threads, device)
    return scales


def round_codes(fmt: GroupFormat, weights: Tensor, scales: Tensor, *, threads: int | None = None) -> Tensor:
    """The nearest code of each weight under its scale: [E, out, in], [E, out, groups] -> i8 [E, out, in]."""
    experts, rows, n_in = weights.shape
    codes = torch.empty(weights.shape, dtype=torch.int8, device=weights.device)
    step = max(1, TILE[weights.device.type] // n_in)

    def work(expert: int, first: int) -> None:
        x = _by_group(weights[expert, first : first + step].to(torch.float32), fmt)
        s = scales[expert, first : first + step].to(torch.float32)[..., None]
        nearest = torch.where(s != 0, x / s, 0.0).round_().clamp_(fmt.low, fmt.high)
        codes[expert, first : first + step] = nearest.flatten(-2)

    _each(work, [(e, r) for e in range(experts) for r in range(0, rows, step)], threads, weights.device)
    return codes


def decode(fmt: GroupFormat, codes: Tensor, scales: Tensor) -> Tensor:
    """code · scale in the scale's own precision, as compressed-tensors computes it: [..., in]."""
    return (_by_group(codes.to(scales.dtype), fmt) * scales[..., None]).flatten(-2)


def _by_group(x: Tensor, fmt: GroupFormat) -> Tensor:
    """[..., in] -> [..., groups, group]."""
    return x.reshape(*x.shape[:-1], -1, fmt.size(x.shape[-1]))


def pack(codes: Tensor, bits: int) -> Tensor:
    """i8 [..., in] -> i32 [..., ceil(in · bits / 32)]: code + 2^(bits-1), lowest bits first, rest 0."""
    unsigned = (codes.to(torch.int16) + (1 << bits - 1)).to(torch.uint8)
    unsigned = torch.nn.functional.pad(unsigned, (0, -codes.shape[-1] % (32 // bits)))
    if bits == 4:
        unsigned = unsigned[..., 0::2] | unsigned[..., 1::2] << 4
    return unsigned.contiguous().view(torch.int32)


def unpack(packed: Tensor, bits: int, n_in: int) -> Tensor:
    """i32 [..., words] -> i8 [..., n_in]; the inverse of `pack`."""
    unsigned = packed.contiguous().view(torch.uint8)
    if bits == 4:
        unsigned = torch.stack([unsigned & 15, unsigned >> 4], -1).flatten(-2)
    return (unsigned[..., :n_in].to(torch.int16) - (1 << bits - 1)).to(torch.int8)


def relative_error(
    fmt: GroupFormat, weights: Tensor, codes: Tensor, scales: Tensor, importance: Tensor | None
) -> Tensor:
    """Importance-weighted squared error over weighted square of each expert: f64 [E]."""
    error = torch.zeros(len(weights), dtype=torch.float64)
    total = torch.zeros_like(error)
    step = max(1, 4 * TILE["cpu"] // weights.shape[-1])
    for expert, matrix in enumerate(weights):
        w = None if importance is None else importance[expert].double().cpu()
        for first in range(0, len(matrix), step):
            rows = slice(first, first + step)
            exact = matrix[rows].float()
            off = (exact - decode(fmt, codes[expert, rows], scales[expert, rows]).float()).square()
            columns = torch.stack([off.sum(0), exact.square().sum(0)]).double().cpu()
            error[expert] += (columns[0] if w is None else columns[0] * w).sum()
            total[expert] += (columns[1] if w is None else columns[1] * w).sum()
    return error / total.clamp(min=torch.finfo(torch.float64).tiny)


@kernel
def _search(x: Tensor, w: Tensor, landings: Tensor, fmt: GroupFormat) -> Tensor:
    """Best storable scale of each group: x [rows, groups, group], w [groups, group] -> f32 [rows, groups]."""
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


def _landings(fmt: GroupFormat, effort: Effort, device: torch.device) -> Tensor:
    return torch.tensor(_LANDINGS[fmt.bits][: _TRIED[effort]], device=device)


def _weights(importance: Tensor, device: torch.device) -> Tensor:
    """f32 [in] with mean 1: sums over thousands of rows stay in range."""
    w = importance.to(device, torch.float64)
    return (w / w.mean()).to(torch.float32)


def _check(fmt: GroupFormat, x: Tensor, expert: int, first: int) -> None:
    """FormatError naming the first weight of x [rows, in] that is NaN, infinite or beyond any scale."""
    limit = torch.finfo(fmt.scale_dtype).max * fmt.high
    low, high = torch.aminmax(x)
    if bool((low >= -limit) & (high <= limit) & torch.isfinite(low) & torch.isfinite(high)):
        return
    row, column = (~(x.abs() <= min(limit, torch.finfo(torch.float32).max))).nonzero()[0].tolist()
    raise FormatError(
        f"{fmt.name} cannot hold weight {float(x[row, column]):g} at expert {expert}, row {first + row}, "
        f"column {column}: weights must be finite and within ±{limit:g}; is the checkpoint damaged?"
    )


def _each(
    work: Callable[[int, int], None],
    tiles: list[tuple[int, int]],
    threads: int | None,
    device: torch.device,
) -> None:
    """work(expert, first row) of every tile; threads run single-threaded kernels, as in `engine`."""
    if threads is None:
        threads = os.cpu_count() or 1 if device.type == "cpu" else 1
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        jobs = [pool.submit(work, expert, first) for expert, first in tiles]
        try:
            for job in jobs:
                job.result()
        finally:
            pool.shutdown(cancel_futures=True)


@cache
def _compiles(fmt: GroupFormat, shape: tuple[int, int, int], effort: Effort, device_type: str) -> bool:
    """Compile the search for tiles of that shape; False, with a warning, where that fails."""
    from torch._dynamo import config  # slow to import, and needed by large tensors only

    device = torch.device(device_type)
    ones = torch.ones(shape, device=device)
    landings = _landings(fmt, effort, device)
    try:
        with config.patch(recompile_limit=64), ThreadPoolExecutor(1) as pool:
            pool.submit(_search, ones, ones[0], landings, fmt).result()
    except (ImportError, RuntimeError) as error:  # no compiler, no Python headers, no triton
        reason = str(error).strip().splitlines() or [type(error).__name__]
        log.warning("%s: kernels do not compile here and run slower: %s", fmt.name, reason[0])
        return False
    return True
