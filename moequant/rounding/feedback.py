"""Whole expert tensors rounded under their Hessians: checks, chunks, threads, fallbacks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moequant import formats
from moequant.errors import FormatError
from moequant.formats import Effort, Format, engine
from moequant.rounding.columns import feed
from moequant.rounding.descent import descend
from moequant.rounding.hessian import SPAN, Factored, factorise, trouble
from moequant.rounding.lattice import Fields, Lattice, lattice_of
from moequant.rounding.twosided import descend_two_sided, even_fisher

COARSE = 4.0
"""Bits below which the size of a weight counts when scales are searched (ggml's factor): measured to help
at 2.6 and 3.4 bits per weight and to hurt at 4.5."""

ROWS_AT_ONCE = 4096
"""Rows (of all experts of a tile) that a thread of a CPU takes at once: what it touches column by column
stays in the second-level cache, and a call into torch still has something to do."""

AT_ONCE = 1 << 24
"""Weights whose errors are summed at once: a head has more than a billion."""

PLAIN = "plain search"


@dataclass(frozen=True, slots=True)
class Options:
    """How to round.

    damping: what is added to a Hessian's diagonal, in means of it. rounds: of coordinate descent.
    effort: of the search for scales. magnitude: exponent of the weights' size in that search, None: the
    format's own below COARSE bits, 0 above. two_sided: rounds under the Fisher of the outputs, where one is
    given. memory: bytes of working memory. threads: None is one per
    core. of: how many weights there are in all, where some experts are rounded at a time: whether kernels are
    compiled is decided by all of them.
    """

    damping: float = 0.01
    rounds: int = 2
    effort: Effort = "default"
    magnitude: float | None = None
    two_sided: int = 2
    memory: int = 1 << 30
    threads: int | None = None
    of: int | None = None


@dataclass(frozen=True, slots=True)
class Fallback:
    """An expert that was not rounded as asked, why, and what was done instead."""

    expert: int
    reason: str
    instead: str = PLAIN


@dataclass(frozen=True, slots=True)
class Rounded:
    """data u8 [E, out, row_bytes]; damping f64 [E] that was needed, NaN for fallbacks."""

    data: Tensor
    damping: Tensor
    fallbacks: tuple[Fallback, ...]

    def chunk(self, count: int) -> list[Rounded]:
        """The same in so many parts, of as many rows each."""
        return [replace(self, data=data) for data in self.data.chunk(count, 1)]


def round_to_hessian(
    fmt: Format | str,
    target: Tensor,
    hessian: Tensor,
    options: Options = Options(),
    fisher: Tensor | None = None,
    shared: Tensor | None = None,
) -> Rounded:
    """Round target [E, out, in] so that tr(E H Eᵀ), E = target - rounded, is small for hessian [E, in, in].

    With the Fisher of the outputs [E, out, out] (or [out, out], the same for all), it is tr(G E H Eᵀ).
    Any float dtype; all on one device, where the work is done in f32. FormatError: shapes that do not
    match, rows that the block does not divide, weights that are not finite or beyond the format's limit.
    An expert whose Hessian is not finite, all zero, or does not factorise when damped by its mean diagonal
    is rounded by the plain search, one whose Fisher cannot be used by its Hessian alone: see `fallbacks`.
    `shared` f32 [E, out, in / block] is the scale that rows have in common, None: found under the diagonals.
    """
    fmt = formats.get(fmt) if isinstance(fmt, str) else fmt
    lattice = lattice_of(fmt)
    _check(fmt, target, hessian, fisher)
    experts, rows, columns = target.shape
    data = torch.empty((experts, rows, fmt.row_bytes(columns)), dtype=torch.uint8, device=target.device)
    used = torch.full((experts,), torch.nan, dtype=torch.float64)
    fallbacks: list[Fallback] = []
    if fisher is not None:
        fisher = fisher.expand(experts, rows, rows)
    if shared is None and fmt.shared is not None:
        shared = engine.shared_scales(fmt, target, usable(hessian.diagonal(dim1=1, dim2=2)), options.effort)
    for chunk in _chunks(options.memory, target):
        every = slice(chunk[0], chunk[-1] + 1)
        reasons = trouble(hessian[every])
        good = [e for e, reason in zip(chunk, reasons, strict=True) if reason is None]
        fallbacks += [Fallback(e, r) for e, r in zip(chunk, reasons, strict=True) if r is not None]
        if good:
            some = every if good == chunk else good  # all of them need no copies
            factored, damping = factorise(lattice, hessian[some], options.damping)
            felt = None if fisher is None else _usable(fisher[some], good, fallbacks)
            task = Task(target[some], None if shared is None else shared[some], felt)
            data[some] = _round_chunk(lattice, task, factored, options)
            used[some] = damping
    for expert in torch.isinf(used).nonzero().flatten().tolist():
        fallbacks.append(Fallback(expert, "the Hessian does not factorise, whatever the damping"))
        used[expert] = torch.nan
    for bad in (f for f in fallbacks if f.instead == PLAIN):
        own = None if shared is None else shared[bad.expert]
        data[bad.expert] = _plain(fmt, target[bad.expert], hessian[bad.expert], options, own)
    return Rounded(data, used, tuple(sorted(fallbacks, key=lambda bad: bad.expert)))


def outputs_lost(
    fmt: Format, target: Tensor, data: Tensor, hessian: Tensor, fisher: Tensor | None = None
) -> Tensor:
    """tr(E H Eᵀ), or tr(G E H Eᵀ), of one expert, f64 [].

    target [out, in], data u8 [out, row_bytes], hessian [in, in], fisher [out, out].
    """
    step = max(1, AT_ONCE // target.shape[1]) if fisher is None else len(target)
    lost = torch.zeros((), dtype=torch.float64, device=target.device)
    for rows in (slice(at, at + step) for at in range(0, len(target), step)):
        error = target[rows].float() - formats.dequantize(fmt, data[rows])
        if fisher is None:
            lost += energy(error, hessian.float())
        else:
            lost += ((fisher.float() @ error @ hessian.float()).double() * error.double()).sum()
    return lost


def energy(rows: Tensor, hessian: Tensor) -> Tensor:
    """tr(X H Xᵀ), f64 [], of X f32 [n, in] under symmetric H f32 [in, in]: two columns meet once."""
    found = torch.zeros((), dtype=torch.float64, device=rows.device)
    for at in range(0, len(hessian), SPAN):
        own, behind = slice(at, at + SPAN), slice(at + SPAN, None)
        felt = rows[:, own] @ hessian[own, own]
        felt.addmm_(rows[:, behind], hessian[behind, own], alpha=2)
        found += (felt.double() * rows[:, own].double()).sum()
    return found


def _check(fmt: Format, target: Tensor, hessian: Tensor, fisher: Tensor | None) -> None:
    if target.ndim != 3 or hessian.shape != (target.shape[0], target.shape[2], target.shape[2]):
        raise FormatError(
            f"Hessians of weights {list(target.shape)} must be [experts, in, in], not {list(hessian.shape)}"
        )
    if fisher is not None and fisher.shape[-2:] != (target.shape[1],) * 2:
        raise FormatError(
            f"the Fisher of weights {list(target.shape)} must be [out, out], not {list(fisher.shape)}"
        )
    fmt.row_bytes(target.shape[2])
    good = (target.abs() <= fmt.limit).flatten(1).all(1)
    if not bool(good.all()):
        raise FormatError(
            f"{fmt.name} cannot hold the weights of expert {int((~good).nonzero()[0])}: they must be "
            f"finite and within ±{fmt.limit:g}; is the checkpoint damaged?"
        )


def _chunks(memory: int, target: Tensor) -> Iterator[list[int]]:
    """Experts that are worked on together."""
    experts, rows, columns = target.shape
    each = 4 * columns * (6 * columns + 10 * rows)  # copies of the Hessian, and of the weights, in f32
    step = max(1, memory // each)
    for first in range(0, experts, step):
        yield list(range(first, min(first + step, experts)))


def usable(diagonal: Tensor) -> Tensor:
    """f64 [..., in]: what columns count by the diagonals of Hessians; all the same where one is of no use."""
    good = (torch.isfinite(diagonal) & (diagonal >= 0)).all(-1, keepdim=True)
    return torch.where(good, diagonal.double(), 1.0)


def _plain(fmt: Format, target: Tensor, hessian: Tensor, options: Options, shared: Tensor | None) -> Tensor:
    """The diagonal search, with what the Hessian's diagonal still says."""
    columns = usable(hessian.diagonal())
    return formats.quantize(fmt, target, columns, options.effort, threads=options.threads, shared=shared)


def _usable(fisher: Tensor, experts: list[int], fallbacks: list[Fallback]) -> Tensor:
    """Fisher [E, out, out] fit for descent; the identity, and an entry in `fallbacks`, where it cannot be."""
    made = even_fisher(fisher)
    for i, reason in enumerate(trouble(fisher)):
        if reason is not None:
            made[i] = torch.eye(made.shape[1], device=made.device)
            why = {"no input was seen": "the Fisher is zero"}.get(reason, reason.replace("Hessian", "Fisher"))
            fallbacks.append(Fallback(experts[i], why, "Hessian alone"))
    return made


@dataclass(frozen=True, slots=True)
class Task:
    """Experts that are rounded together: target [E, out, in], the scales that rows share and the Fisher of
    the outputs, None where there is none."""

    target: Tensor
    shared: Tensor | None
    fisher: Tensor | None


def _round_chunk(lattice: Lattice, task: Task, factored: Factored, options: Options) -> Tensor:
    """target [E, out, in] -> u8 [E, out, row_bytes], tile by tile."""
    fmt, target, fisher = lattice.fmt, task.target, task.fisher
    data = torch.empty(
        (*target.shape[:2], fmt.row_bytes(target.shape[2])), dtype=torch.uint8, device=target.device
    )
    magnitude = options.magnitude
    if magnitude is None:
        magnitude = fmt.magnitude if fmt.bits < COARSE else 0.0
    size = target.numel() if options.of is None else options.of
    compiled = engine.compiles(fmt, size, magnitude, options.effort, target.device)
    importance = engine.even_out(factored.damped.diagonal(dim1=1, dim2=2).double())

    def work(tile: tuple[slice, slice]) -> None:
        experts, rows = tile
        own = factored.of(experts)

        def encode(weights: Tensor, begin: int, end: int) -> Fields:
            x = weights.transpose(1, 2)
            w = importance[experts, None, begin:end].expand_as(x)
            x, w = (v.reshape(-1, lattice.block) for v in (x, w))
            d = None if task.shared is None else task.shared[experts, rows]
            if d is not None:
                d = d[:, :, begin // lattice.block : end // lattice.block].reshape(-1, 1)
            blocks = engine.Blocks(x, w, d)
            packed = engine.encode_blocks(fmt, blocks, options.effort, magnitude, compiled)
            return lattice.read(packed.view(weights.shape[0], weights.shape[2], -1))

        goal = target[experts, rows].float().transpose(1, 2).contiguous()
        fields = feed(lattice, goal, own, encode)
        descend(lattice, goal, fields, own.damped, options.rounds)
        if fisher is not None:
            descend_two_sided(lattice, goal, fields, own.damped, fisher[experts], options.two_sided)
        data[experts, rows] = lattice.write(fields)

    tiles = list(_tiles(target, options.threads, whole=fisher is not None))
    _for_each(work, tiles, options.threads, target.device)
    return data


def _tiles(target: Tensor, threads: int | None, whole: bool) -> Iterator[tuple[slice, slice]]:
    """Experts and rows that are worked on together: on a GPU all of them, `whole` experts where asked.

    An expert is cut into the same rows however many there are, so that it is rounded to the same bytes.
    """
    experts, rows = target.shape[:2]
    if target.device.type != "cpu":
        yield slice(0, experts), slice(0, rows)
        return
    workers = threads or os.cpu_count() or 1
    height = rows if whole else min(ROWS_AT_ONCE, -(-rows // workers))
    step = max(1, min(ROWS_AT_ONCE, -(-experts * rows // workers)) // height)
    for first in range(0, experts, step):
        for row in range(0, rows, height):
            yield slice(first, first + step), slice(row, min(row + height, rows))


def _for_each(
    work: Callable[[tuple[slice, slice]], None],
    tiles: list[tuple[slice, slice]],
    threads: int | None,
    device: torch.device,
) -> None:
    """Threads take tiles in turn, each with single-threaded operations, as in `formats.engine`."""
    if threads is None:
        threads = os.cpu_count() or 1 if device.type == "cpu" else 1
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for done in [pool.submit(work, tile) for tile in tiles]:
            done.result()
