"""Tensors that are stored as numbers: norms, biases, routers, tables, and matrices that nobody quantized."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import prod

import torch
from torch import Tensor

from moequant.check.damage import DIRECTION, GAIN
from moequant.check.source import Plain
from moequant.checkpoint import load

CLOSE = 2.0**-7
"""Relative difference of a number that was stored in fewer bits; bf16 rounds by up to 2^-9, and what a file
computes of several numbers may be off by more."""

LEAST = 2.0**-24
"""F16 has no smaller number."""


PIECE = 1 << 22
"""Numbers that are compared at once: the temporaries of a whole matrix would be many times as large as it."""


def misfit(plain: Plain, vouched: bool, piece: int = PIECE) -> str | None:
    """What is wrong with a tensor, None when nothing is.

    `vouched`: a checksum says that the bytes are those that were written. Then a matrix may be another than
    the baseline's on purpose, as one that was rounded towards a corrected target. `piece` numbers are
    compared at once.
    """
    values = plain.values()
    whole = not values.is_floating_point()
    if not whole and (bad := sum(int((~each.isfinite()).sum()) for each in _cut(values, piece))):
        return f"{bad} of {values.numel()} values are NaN or infinite"
    if plain.weight is None:
        return None
    wanted = load(plain.weight)
    if values.numel() != wanted.numel():
        return f"is {list(values.shape)}, the baseline's {list(wanted.shape)}"
    pieces = zip(_cut(values, piece), _cut(wanted, piece), strict=True)
    if vouched and not whole:
        return _as_a_whole(pieces)
    return _first(values.shape, pieces)


def _cut(x: Tensor, piece: int) -> Iterator[Tensor]:
    """The numbers of a tensor in order, so many at a time."""
    flat = x.flatten()
    return (flat[start : start + piece] for start in range(0, len(flat), piece))


Pieces = Iterable[tuple[Tensor, Tensor]]
"""Numbers that were found, and those of the baseline."""


def _first(shape: Sequence[int], pieces: Pieces) -> str | None:
    """How many are wrong, and the first of them."""
    count, before, told = 0, 0, ""
    for values, wanted in pieces:
        if values.is_floating_point():
            right = wanted.float()
            wrong = (values.float() - right).abs() > right.abs() * CLOSE + LEAST
        else:
            wrong = values != wanted
        if not count and bool(wrong.any()):
            at = int(wrong.byte().argmax())
            place = [int(each) for each in torch.unravel_index(torch.tensor(before + at), shape)]
            told = f"at {place} {values[at].item():.6g} for {wanted[at].item():.6g}"
        count, before = count + int(wrong.sum()), before + len(wrong)
    return f"{count} of {prod(shape)} values are not the baseline's, {told}" if count else None


def _as_a_whole(pieces: Pieces) -> str | None:
    """Whether they point elsewhere, or are too large or too small; in f64, for squares of 1e30, by which
    rotations are switched off."""
    own = square = product = 0.0
    for found, right in pieces:
        values, wanted = found.double(), right.double()
        own += float(values.square().sum())
        square += float(wanted.square().sum())
        product += float((values * wanted).sum())
    if not square:
        return None
    cosine = product / max((square * own) ** 0.5, 1e-30)
    if cosine < DIRECTION:
        return f"holds other numbers than the baseline (cosine {cosine:.3f})"
    if not GAIN[0] < (gain := product / square) < GAIN[1]:
        return f"numbers are {gain:.3g} times the baseline's"
    return None
