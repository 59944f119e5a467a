"""A weight's values, read from the files: all of them, or those of some experts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moequant.checkpoint.codecs import repack
from moequant.checkpoint.slots import FLOATS
from moequant.values import Origin, Stack, Stored, Weight
from moequant.values.ops import Part, Stacked, apply, shape_after


def load(weight: Weight) -> Tensor:
    """A weight's values in the checkpoint's precision, shape `weight.shape`; of some experts (`Weight.of`) or
    rows (`Weight.at`) no others are read."""
    origin = weight.origin
    if origin.rows is not None:
        return apply(origin.ops, _rows(origin.stored, origin.rows))
    if weight.stack is not Stack.EXPERTS:
        parts = [stored.read() for stored in origin.stored]
        return apply(origin.ops, parts[0] if len(parts) == 1 else torch.cat(parts)).contiguous()
    wanted = _numbers(weight)
    if _is_cut(origin):
        return _cut_out(origin, wanted).contiguous()
    out: Tensor | None = None
    for at, number in enumerate(wanted):
        one = _matrix(origin, number)
        if out is None:
            out = torch.empty((len(wanted), *one.shape), dtype=one.dtype)
        out[at] = one
    assert out is not None
    return out


def load_packed(weight: Weight) -> Tensor | None:
    """What is stored, in the bytes of the type that holds it exactly, u8 [.., rows, row_bytes]; None when a
    look at the values shows that it does not."""
    origin, kind = weight.origin, weight.origin.shipped
    if kind is None or kind in FLOATS:
        return None
    parts = []
    if origin.rows is not None:
        if not isinstance(origin.rows, range) or len(origin.stored) > 1:
            return None
        return repack(origin.stored[0], kind, None, origin.rows)
    for stored, index in matrices(weight):
        rows = repack(stored, kind, index, range(stored.shape[-2]))
        if rows is None:
            return None
        parts.append(apply(origin.ops, rows))
    several = weight.is_expert or _is_stacked(origin)
    return torch.stack(parts) if several else parts[0].contiguous()


def _rows(stored: tuple[Stored, ...], wanted: range | tuple[int, ...]) -> Tensor:
    """Rows of matrices that lie one below the other, in rising order; neighbours are read together."""
    numbers = torch.arange(wanted.start, wanted.stop) if isinstance(wanted, range) else torch.tensor(wanted)
    ends = torch.tensor([each.shape[-2] for each in stored]).cumsum(0)
    out: Tensor | None = None
    done = 0
    for each, end in zip(stored, ends.tolist(), strict=True):
        first = end - each.shape[-2]
        here = numbers[(numbers >= first) & (numbers < end)] - first
        breaks = (here.diff() != 1).nonzero().flatten() + 1
        for run in here.tensor_split(breaks) if len(here) else ():
            values = each.read(rows=range(int(run[0]), int(run[-1]) + 1))
            if out is None:
                out = torch.empty((len(numbers), values.shape[-1]), dtype=values.dtype)
            out[done : done + len(run)] = values
            done += len(run)
    assert out is not None and done == len(numbers)
    return out


def matrices(weight: Weight) -> Iterator[tuple[Stored, int | None]]:
    """What is stored of each matrix of a weight, and which one of a stack it is; of a weight that lies in
    several tensors, one below the other, the first."""
    stacked = _is_stacked(weight.origin)
    for number in _numbers(weight) if weight.is_expert or stacked else range(1):
        yield (weight.origin.stored[0], number) if stacked else (weight.origin.stored[number], None)


def _is_stacked(origin: Origin) -> bool:
    """Whether all matrices lie in one tensor."""
    return len(origin.stored) == 1 and len(origin.stored[0].shape) == 3


def _is_cut(origin: Origin) -> bool:
    """Whether one stored matrix is cut into those of all experts."""
    shape = origin.stored[0].shape
    return len(origin.stored) == 1 and len(shape) == 2 and len(shape_after(origin.ops, shape)) == 3


def _numbers(weight: Weight) -> range:
    """Which matrices of what is stored are those of a stack of experts."""
    return range(weight.matrices) if weight.origin.matrices is None else weight.origin.matrices


def _cut_out(origin: Origin, wanted: range) -> Tensor:
    """These matrices of one that holds all of them, one below the other: of no others is anything read."""
    stored, first = origin.stored[0], origin.ops[0]
    if not isinstance(first, Stacked) or first.axis != -2:
        return apply(origin.ops, stored.read())[wanted.start : wanted.stop]
    rows = stored.shape[-2] // first.count
    read = stored.read(rows=range(wanted.start * rows, wanted.stop * rows))
    return apply((Stacked(len(wanted)), *origin.ops[1:]), read)


def _matrix(origin: Origin, number: int) -> Tensor:
    """One expert's matrix; where the first op takes rows, no others are read."""
    stored, index = (origin.stored[0], number) if _is_stacked(origin) else (origin.stored[number], None)
    first = origin.ops[0] if origin.ops else None
    if isinstance(first, Part) and first.axis == -2 and first.step == 1:
        return apply(origin.ops[1:], stored.read(index, range(first.start, first.stop)))
    return apply(origin.ops, stored.read(index))


def not_finite(weight: Weight, values: Tensor) -> str | None:
    """Which stored tensor of a loaded weight holds NaN or infinity, and how many; None when none does."""
    if torch.isfinite(values).all():
        return None
    stored = weight.origin.stored
    matrices = weight.is_expert and len(stored) > 1
    parts = values if matrices else values[None]
    bad = (~torch.isfinite(parts)).flatten(1).sum(1)
    first = int(bad.nonzero()[0])
    if matrices:
        named = stored[_numbers(weight)[first]]
    else:
        named = next((each for each in stored if not torch.isfinite(each.read()).all()), stored[0])
    return (
        f"tensor {named.name} ({weight.name}): {int(bad[first])} of "
        f"{parts[first].numel()} values are NaN or infinite; the checkpoint is damaged"
    )
