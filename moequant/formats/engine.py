"""From tensors to packed bytes and back, for every format.

A tensor is cut into tiles of whole blocks, whatever its rows and experts; each tile is
checked, weighted, and handed to the format's own `encode`. Working memory is a few
tiles a thread. Threads take tiles in turn, each running single-threaded kernels:
OpenMP inside such short kernels spends its time at barriers.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from moequant.errors import FormatError
from moequant.formats.base import Effort, Format
from moequant.formats.kernel import TILE, as_compiled, kernel, plain, tile
from moequant.native import loops

# Importance below this share of its expert's median (of the channels that were excited at all) is raised to
# it: what calibration never excited must still be stored as what it is, not sacrificed for its neighbours.
FLOOR = 0.02
# Importance beyond this many medians counts as this much: products of two of them, and of codes and scales,
# must stay numbers of 32 bits.
CEILING = 1e12
# Tensors with fewer weights are packed before a compiler would have started to repay itself.
COMPILE_FROM = 1 << 23
EVEN = 32
"""Blocks that are packed uncompiled come in multiples of this."""

log = logging.getLogger(__name__)


def quantize(
    fmt: Format,
    weights: Tensor,
    importance: Tensor | None = None,
    effort: Effort = "default",
    *,
    magnitude: float | None = None,
    threads: int | None = None,
    shared: Tensor | None = None,
    device: str | None = None,
) -> Tensor:
    """Pack weights [..., rows, in] (any float dtype) -> uint8 [..., rows, row_bytes].

    importance [..., in], all >= 0, is one weight per input channel, shared by the rows;
    None means all equal. Only ratios within a block matter. `magnitude` overrides the
    format's exponent. `threads` None means one per core on a CPU. `shared` f32 [E, rows, in / block] is
    the scale of blocks that rows have in common, None: found here, for formats that have one. `device` is
    where tiles are searched, None: where the weights are; what comes out is where those are.

    FormatError: rows that the block does not divide, shapes that do not match, NaN,
    infinity, or a weight beyond `fmt.limit` (with its expert, row and column).
    """
    row_bytes = fmt.row_bytes(weights.shape[-1])
    weights = weights.detach()
    stack = weights if weights.ndim == 3 else weights.reshape(-1, *weights.shape[-2:])
    per_expert = _check_importance(weights, importance)
    exponent = fmt.magnitude if magnitude is None else magnitude
    there = weights.device if device is None else torch.device(device)
    large = compiles(fmt, weights.numel(), exponent, effort, there)
    step = _blocks_at_once(fmt, there.type, large)
    if shared is None and fmt.shared is not None:
        shared = fmt.shared.find(stack.float(), per_expert, effort)
    given = None if shared is None else shared.reshape(-1, 1).to(there)
    per_expert = per_expert.to(there)
    out = torch.empty((stack[..., 0].numel() * row_bytes,), dtype=torch.uint8, device=weights.device)
    blocks = out.view(-1, fmt.block_bytes)

    def work(first: int, last: int) -> None:
        x = _read(stack, fmt, first, last).to(there)
        _check_weights(x, fmt, stack, first)
        per_block = _importance_of(per_expert, stack, fmt, first, last)
        d = None if given is None else given[first:last]
        made = _encode(fmt, Blocks(x, per_block, d), effort, exponent, step if large else None)
        blocks[first:last] = made.to(blocks.device)

    _for_each_tile(work, len(blocks), step, threads, there)
    return out.view(*weights.shape[:-1], row_bytes)


@dataclass(frozen=True, slots=True)
class Blocks:
    """x f32 [n, block], their importance f32 [n, block], and d f32 [n, 1] where rows share it."""

    x: Tensor
    importance: Tensor
    d: Tensor | None = None

    def cut(self, which: slice) -> Blocks:
        """Some of them."""
        d = None if self.d is None else self.d[which]
        return Blocks(self.x[which], self.importance[which], d)


def shared_scales(fmt: Format, weights: Tensor, importance: Tensor | None, effort: Effort) -> Tensor:
    """f32 [E, rows, in / block] for weights [E, rows, in] under importance [E, in]: `Shared.find`.

    Of weights that are no numbers come none, and they are for `quantize` to refuse.
    """
    assert fmt.shared is not None
    weights = weights.detach().float()
    return fmt.shared.find(weights, _check_importance(weights, importance), effort)


def encode_blocks(fmt: Format, blocks: Blocks, effort: Effort, magnitude: float, compiled: bool) -> Tensor:
    """Pack blocks -> uint8 [n, block_bytes], on this thread.

    For those who cut tensors themselves: nothing is checked, x is limited to what the format can hold,
    and the format's gain is left out. `compiled` says that `compiles` agreed.
    """
    device = blocks.x.device.type
    step = _blocks_at_once(fmt, device, compiled)
    plain = replace(fmt, gain=1.0)
    # Views with strides of their own would be summed in another order, and each compiled anew.
    x, importance = blocks.x.contiguous().clamp(-fmt.limit, fmt.limit), blocks.importance.contiguous()
    blocks = replace(blocks, x=x, importance=importance)
    fill = step if compiled else None
    parts = [slice(i, i + step) for i in range(0, len(blocks.x), step)]
    return torch.cat([_encode(plain, blocks.cut(part), effort, magnitude, fill) for part in parts])


def compiles(fmt: Format, weights: int, magnitude: float, effort: Effort, device: torch.device) -> bool:
    """Whether torch's compiler is worth it for so many weights, and to be had; compiles them if so."""
    if fmt.loops and loops(device) is not None:
        return False
    return weights >= COMPILE_FROM and device.type in TILE and _compiles(fmt, magnitude, effort, device.type)


def _encode(fmt: Format, blocks: Blocks, effort: Effort, exponent: float, fill: int | None) -> Tensor:
    """Weigh and pack blocks, filled up to the one size that kernels are compiled for, if any."""
    count = len(blocks.x)
    # Uncompiled, sums over a few blocks are made in another order than over many.
    full = fill or -(-count // EVEN) * EVEN
    with as_compiled() if fill else nullcontext():
        x, importance = _fill(blocks.x, full, 0.0), _fill(blocks.importance, full, 1.0)
        d = None if blocks.d is None else _fill(blocks.d, full, 1.0)
        return _weighed(fmt, Blocks(x, importance, d), effort, exponent)[:count]


def _weighed(fmt: Format, blocks: Blocks, effort: Effort, exponent: float) -> Tensor:
    x, w, d = blocks.x, blocks.importance, blocks.d
    if exponent:
        w = _weigh(x, w, exponent, fmt.spread)
    if d is not None and fmt.shared is not None:
        return fmt.shared.encode(x * fmt.gain, w, d, effort)
    return fmt.encode(x * fmt.gain, w, effort)


def dequantize(fmt: Format, packed: Tensor, *, threads: int | None = None) -> Tensor:
    """Unpack uint8 [..., rows, row_bytes] -> f32 [..., rows, in], bit for bit what ggml decodes."""
    if packed.dtype != torch.uint8 or packed.shape[-1] % fmt.block_bytes:
        raise FormatError(
            f"{fmt.name} unpacks uint8 rows of whole {fmt.block_bytes}-byte blocks, "
            f"not {packed.dtype} {list(packed.shape)}"
        )
    blocks = packed.reshape(-1, fmt.block_bytes)
    out = torch.empty((len(blocks), fmt.block), dtype=torch.float32, device=packed.device)

    def work(first: int, last: int) -> None:
        out[first:last] = fmt.decode(blocks[first:last])

    step = tile(packed.device.type) // fmt.block
    _for_each_tile(work, len(blocks), step, threads, packed.device)
    return out.view(*packed.shape[:-1], packed.shape[-1] // fmt.block_bytes * fmt.block)


def _for_each_tile(
    work: Callable[[int, int], None], n_blocks: int, step: int, threads: int | None, device: torch.device
) -> None:
    """Call work(first, last) for consecutive ranges of `step` blocks that cover `n_blocks`."""
    if threads is None:
        threads = os.cpu_count() or 1 if device.type == "cpu" else 1
    inference = torch.is_inference_mode_enabled()  # a thread of its own does not know

    def work_as_here(first: int, last: int) -> None:
        with torch.inference_mode() if inference else torch.no_grad():
            work(first, last)

    if 0 < n_blocks <= step and torch.get_num_threads() == 1:
        work_as_here(0, n_blocks)  # what a thread of its own would compute, without the cost of starting one
        return
    with _workers(threads) as pool:
        tiles = [pool.submit(work_as_here, i, min(i + step, n_blocks)) for i in range(0, n_blocks, step)]
        try:
            for tile in tiles:
                tile.result()
        finally:
            pool.shutdown(cancel_futures=True)  # a refused weight ends the rest


def _workers(threads: int) -> ThreadPoolExecutor:
    """Threads whose torch operations use one core each; set_num_threads is per calling thread."""
    return ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))


@cache
def _compiles(fmt: Format, exponent: float, effort: Effort, device_type: str) -> bool:
    """Compile the kernels of `fmt` by encoding one tile; False, with a warning, where that fails."""
    began = time.perf_counter()
    try:
        with _workers(1) as pool:
            pool.submit(_encode_a_tile, fmt, exponent, effort, device_type).result()
    except (ImportError, RuntimeError) as error:  # no compiler, no Python headers, no triton
        reason = str(error).strip().splitlines() or [type(error).__name__]
        log.warning("%s: the encoder cannot be compiled here and runs slower: %s", fmt.name, reason[0])
        return False
    log.info("%s: the encoder was compiled in %.1f s", fmt.name, time.perf_counter() - began)
    return True


def _blocks_at_once(fmt: Format, device_type: str, compiled: bool) -> int:
    """Whole tiles for torch's compiler; less than one, which is not compiled, and more of it for loops: they
    need no room for what torch writes between two calls."""
    weights = tile(device_type) * fmt.tiles if compiled else tile(device_type) // (2 if fmt.loops else 4)
    return max(1, weights // fmt.block)


def _encode_a_tile(fmt: Format, exponent: float, effort: Effort, device_type: str) -> None:
    step = _blocks_at_once(fmt, device_type, True)
    x, importance = (torch.ones((step, fmt.block), dtype=torch.float32, device=device_type) for _ in range(2))
    d = None if fmt.shared is None else torch.ones((step, 1), dtype=torch.float32, device=device_type)
    _encode(fmt, Blocks(x, importance, d), effort, exponent, step)


def _read(stack: Tensor, fmt: Format, first: int, last: int) -> Tensor:
    """f32 [last - first, block]: those blocks of stack [E, rows, in], in memory order or not."""
    if stack.is_contiguous():
        return stack.view(-1, fmt.block)[first:last].to(torch.float32)
    per_row = stack.shape[-1] // fmt.block
    rows = torch.arange(first // per_row, -(-last // per_row), device=stack.device)
    x = stack[rows // stack.shape[1], rows % stack.shape[1]].to(torch.float32).view(-1, fmt.block)
    skip = first % per_row
    return x[skip : skip + last - first]


def _check_weights(x: Tensor, fmt: Format, stack: Tensor, first: int) -> None:
    """FormatError naming the first weight of x that is NaN, infinite or beyond the limit."""
    low, high = torch.aminmax(x)
    if bool((low >= -fmt.limit) & (high <= fmt.limit)):
        return
    at = int((~(x.abs() <= fmt.limit)).flatten().nonzero()[0]) + first * fmt.block
    row, column = divmod(at, stack.shape[-1])
    expert, row = divmod(row, stack.shape[1])
    value = float(stack[expert, row, column])
    raise FormatError(
        f"{fmt.name} cannot hold weight {value:g} at expert {expert}, row {row}, column {column}: "
        f"weights must be finite and within ±{fmt.limit:g}; is the checkpoint damaged?"
    )


def _check_importance(weights: Tensor, importance: Tensor | None) -> Tensor:
    """f32 [E, in] with median 1 in each expert and a positive floor; FormatError when it cannot be that."""
    expected = (*weights.shape[:-2], weights.shape[-1])
    if importance is None:
        return torch.ones(expected, dtype=torch.float32, device=weights.device).view(-1, weights.shape[-1])
    if importance.shape != expected:
        raise FormatError(
            f"importance of weights {list(weights.shape)} must be {list(expected)}, one value per expert and "
            f"input channel, not {list(importance.shape)}"
        )
    return even_out(importance.to(weights.device, torch.float64).reshape(-1, weights.shape[-1]))


def even_out(per_expert: Tensor) -> Tensor:
    """Importance f64 [E, in] -> f32 with median 1 in each expert and a positive floor; FormatError if bad."""
    bad = ~(torch.isfinite(per_expert) & (per_expert >= 0))
    if bool(bad.any()):
        expert, column = bad.nonzero()[0].tolist()
        raise FormatError(
            f"importance {float(per_expert[expert, column]):g} at expert {expert}, column {column}: "
            "it must be finite and not negative; recompute the statistics"
        )
    usual = torch.where(per_expert > 0, per_expert, torch.nan).nanmedian(-1, keepdim=True).values
    # An expert that saw nothing has no opinion: all its channels count the same.
    per_expert = torch.where(usual > 0, per_expert / usual, torch.ones_like(per_expert))
    return per_expert.clamp(FLOOR, CEILING).to(torch.float32)


def _importance_of(per_expert: Tensor, stack: Tensor, fmt: Format, first: int, last: int) -> Tensor:
    """f32 [last - first, block]: the importance of those blocks."""
    per_row = stack.shape[-1] // fmt.block
    rows = torch.arange(first // per_row, -(-last // per_row), device=per_expert.device)
    skip = first % per_row
    return per_expert[rows // stack.shape[1]].view(-1, fmt.block)[skip : skip + last - first]


def _fill(x: Tensor, rows: int, value: float) -> Tensor:
    """x [n, block] continued to `rows` rows with `value`."""
    x = plain(x)
    return x if len(x) == rows else torch.cat([x, x.new_full((rows - len(x), x.shape[1]), value)])


@kernel
def _weigh(x: Tensor, importance: Tensor, exponent: float, spread: float) -> Tensor:
    """Weights of the squared error, like x: importance · (spread + x²/mean(x²))^(exponent/2), per block."""
    square = x * x
    # Divided by the mean, which no choice within a block depends on, so that w has no unit.
    mean = square.mean(-1, keepdim=True).clamp_min(1e-30)
    return importance * (spread + square / mean) ** (exponent / 2)
