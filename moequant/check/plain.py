"""Tensors that are stored as numbers: norms, biases, routers, tables, and matrices that nobody quantized."""

from __future__ import annotations

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


def misfit(plain: Plain, vouched: bool) -> str | None:
    """What is wrong with a tensor, None when nothing is.

    `vouched`: a checksum says that the bytes are those that were written. Then a matrix may be another than
    the baseline's on purpose, as one that was rounded towards a corrected target.
    """
    values = plain.values()
    whole = not values.is_floating_point()
    if not whole and (bad := int((~torch.isfinite(values)).sum())):
        return f"{bad} of {values.numel()} values are NaN or infinite"
    if plain.weight is None:
        return None
    wanted = load(plain.weight)
    if values.numel() != wanted.numel():
        return f"is {list(values.shape)}, the baseline's {list(wanted.shape)}"
    wanted = wanted.view(values.shape)
    if whole:
        return _first(values, wanted, values != wanted)
    values, wanted = values.float(), wanted.float()
    if vouched:
        return _as_a_whole(values, wanted)
    far = (values - wanted).abs() > wanted.abs() * CLOSE + LEAST
    return _first(values, wanted, far)


def _first(values: Tensor, wanted: Tensor, wrong: Tensor) -> str | None:
    """How many are wrong, and the first of them."""
    count = int(wrong.sum())
    if not count:
        return None
    at = int(wrong.flatten().byte().argmax())
    place = [int(index) for index in torch.unravel_index(torch.tensor(at), values.shape)]
    found, right = (f"{each.flatten()[at].item():.6g}" for each in (values, wanted))
    return f"{count} of {values.numel()} values are not the baseline's, at {place} {found} for {right}"


def _as_a_whole(values: Tensor, wanted: Tensor) -> str | None:
    """Whether they point elsewhere, or are too large or too small; in f64, for squares of 1e30, by which
    rotations are switched off."""
    values, wanted = values.double(), wanted.double()
    square, product = float(wanted.square().sum()), float((values * wanted).sum())
    if not square:
        return None
    cosine = product / max((square * float(values.square().sum())) ** 0.5, 1e-30)
    if cosine < DIRECTION:
        return f"holds other numbers than the baseline (cosine {cosine:.3f})"
    if not GAIN[0] < (gain := product / square) < GAIN[1]:
        return f"numbers are {gain:.3g} times the baseline's"
    return None
