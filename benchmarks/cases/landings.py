"""The ranges that the searches of `formats/affine.py` and `formats/symmetric.py` try first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from benchmarks.harness import Rows, case
from benchmarks.tensors import importance, weights
from moequant.formats import affine, symmetric
from moequant.formats.engine import _weigh
from moequant.formats.layout import clip, inverse, to_lanes

SHAPE = (1, 24, 2048)


@dataclass(frozen=True)
class Landings:
    """`count` ranges for each grid, of `steps` candidates a side."""

    count: int = 24
    steps: int = 25


@case("The ranges that searches try first", Landings(2, 3))
def landings(o: Landings) -> Rows:
    """Each candidate says where the extreme weights of a sub-block land among its codes, before rounding.
    One after another the candidate is taken that lowers the error most, together with those taken before:
    summed over sub-blocks of twelve kinds of tensor, each kind counting the same. What is minimised is the
    error with the scale (and the minimum) solved for the codes and not yet rounded."""
    for grid, reach in (
        (affine.Affine(16, 3, 15), 1.0),
        (affine.Affine(32, 15, 63), 1.2),
        (affine.Affine(32, 31, 63), 1.2),
    ):
        line = [round(float(v), 2) for v in torch.linspace(-reach, reach, o.steps)]
        ends = list(product(line, line))
        errors = [affine_errors(grid, ends, x, w) for x, w in kinds(grid.sub)]
        for order, at in enumerate(greedy(errors, o.count), 1):
            yield {"codes to": grid.top, "order": order, "low end": ends[at][0], "high end": ends[at][1]}
    for low, high, sub in ((-4, 3, 16), (-8, 7, 32), (-16, 15, 32), (-32, 31, 16), (-127, 127, 32)):
        table = symmetric.Symmetric(sub, low, high)
        shares = torch.linspace(0.5, 1.3, 3 * o.steps + 6)
        places = [round(float(v), 2) for v in torch.cat([low * shares, high * shares])]
        errors = [symmetric_errors(table, places, x, w) for x, w in kinds(sub)]
        for order, at in enumerate(greedy(errors, o.count), 1):
            yield {"codes from": low, "order": order, "largest lands at": places[at]}


def kinds(sub: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(x, w) in lanes: Gaussian or heavy-tailed, flat to spiky importance, magnitude factor or not."""
    for i, (kind, form, p) in enumerate(
        product(("Gaussian", "heavy-tailed"), ("flat", "log-normal", "channels x100"), (0.0, 1.0))
    ):
        x = weights(kind, SHAPE, 10 + i).view(-1, 256)
        v = importance(form, SHAPE, 30 + i)[:, None].expand(SHAPE).reshape(-1, 256)
        w = _weigh(x, v, p, 2.0) * x.square().mean(-1, keepdim=True) ** (p / 2)
        yield to_lanes(x, sub), to_lanes(w, sub)


def affine_errors(grid: affine.Affine, ends: list[tuple[float, float]], x: Tensor, w: Tensor) -> Tensor:
    """[candidates, sub-blocks]."""
    moments, flat, _ = affine._measure(grid, x, w)
    unit = (x - moments.middle.unsqueeze(-2)) * inverse(moments.reach).unsqueeze(-2)
    rows = []
    for a, b in ends:
        low, high = a, grid.top - b
        codes = clip((unit * ((high - low) / 2) + (high + low) / 2).round(), grid.top)
        rows.append(torch.minimum(affine._solve(grid, x, w, moments, codes).error, flat).flatten())
    return torch.stack(rows)


def symmetric_errors(grid: symmetric.Symmetric, landings: list[float], x: Tensor, w: Tensor) -> Tensor:
    """[candidates, sub-blocks]."""
    largest, power = symmetric._measure(x), (w * (x * x)).sum(-2)
    fits = [symmetric._solve(x, w, symmetric._codes(grid, x, largest * at)).error for at in landings]
    return (torch.stack(fits) + power).clamp_min(0).flatten(1)


def greedy(errors: list[Tensor], count: int) -> list[int]:
    """Candidates in the order of what each adds, from one [candidates, sub-blocks] per kind."""
    table = torch.cat([e / e.amin(0).double().sum().float() for e in errors], 1)
    best, chosen = torch.full_like(table[0], torch.inf), []
    for _ in range(count):
        chosen.append(int(torch.minimum(table, best).double().sum(1).argmin()))
        best = torch.minimum(best, table[chosen[-1]])
    return chosen
