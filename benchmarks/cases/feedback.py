"""What rounding under full Hessians saves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.data import DEMO, rows
from benchmarks.harness import Rows, case
from moequant import formats
from moequant.checkpoint import load, open_checkpoint
from moequant.forward.experts import EXPERTS
from moequant.forward.model import build_model
from moequant.forward.stream import sites
from moequant.forward.taps import Recorder, recording, watch
from moequant.rounding import Options, round_to_hessian
from moequant.rounding.feedback import outputs_lost
from tests.rounding.data import correlated

Problem = tuple[Tensor, Tensor, Tensor]
"""Weights [E, out, in], Hessians [E, in, in] that calibrate, and those that score."""

SHAPE = (4, 256)
"""Experts and rows of random problems."""


@dataclass(frozen=True)
class Feedback:
    """Random inputs of these widths, unless a model is named. `rounds` of coordinate descent."""

    types: tuple[str, ...] = (
        "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ4_NL", "Q4_0", "Q8_0", "MXFP4", "IQ1_S",
        "IQ2_XXS", "IQ2_S", "IQ3_XXS", "IQ3_S",
    )  # fmt: skip
    columns: tuple[int, ...] = (256, 1024)
    rounds: tuple[int, ...] = (0, 2)
    model: Path | None = None
    text: Path | None = None
    text_rows: int = 16


@case("What rounding under full Hessians saves", Feedback(("Q2_K",), rounds=(0,), model=DEMO, text_rows=2))
def feedback(o: Feedback) -> Rows:
    """Output error tr(E H Eᵀ) and CPU time over the plain search's. Random inputs share directions (rank
    in/4, 64 % of the power) and have channels of uneven size, 4·in tokens an expert, scored under the
    Hessian itself. With a model, every other row of tokens gives the Hessians of its experts (tokens
    weighted by the square of the router's weight) and the rest those that score; a row is the mean over
    expert tensors."""
    if o.model:
        problems = {"experts": list(of_model(o.model, o.text, o.text_rows))}
    else:
        problems = {f"in={columns}": [random(columns)] for columns in o.columns}
    for name in o.types:
        for label, group in problems.items():
            found = [compare(name, problem, o.rounds) for problem in group]
            means = {key: sum(each[key] for each in found) / len(found) for key in found[0]}
            yield {"type": name, "inputs": label} | means


def random(columns: int) -> Problem:
    """A problem whose Hessian also scores."""
    weights, hessian = correlated(*SHAPE, columns, 4 * columns)
    return weights, hessian, hessian


def compare(name: str, problem: Problem, rounds: tuple[int, ...]) -> dict[str, float]:
    """The plain search's speed, then for each of `rounds` the ratio of the error and of the time."""
    fmt, (weights, hessian, score) = formats.get(name), problem
    plain = partial(formats.quantize, fmt, weights, hessian.diagonal(dim1=1, dim2=2), threads=1)

    def lost(data: Tensor) -> float:
        return float(sum(outputs_lost(fmt, *each) for each in zip(weights, data, score, strict=True)))

    plain()  # compiles
    data, seconds = measure.cpu(plain)
    base, row = lost(data), {"plain Mw/s": weights.numel() / seconds / 1e6}
    for n in rounds:
        options = Options(rounds=n, threads=1)
        found, spent = measure.cpu(partial(round_to_hessian, fmt, weights, hessian, options))
        row |= {f"{n} rounds: error": lost(found.data) / base, f"{n} rounds: time": spent / seconds}
    return row


class Grams(Recorder):
    """Sums of g² x xᵀ for every expert, f64, of the rows that calibrate [0] and those that score [1]."""

    def __init__(self) -> None:
        self.half = 0
        self.sums: dict[tuple[str, int], list[Tensor]] = {}

    def expert(self, name: str, expert: int, inputs: Tensor, gates: Tensor) -> None:
        n = inputs.shape[-1]
        zeros = [torch.zeros(n, n, dtype=torch.float64) for _ in range(2)]
        weighted = (inputs * gates[:, None]).double()
        self.sums.setdefault((name, expert), zeros)[self.half] += weighted.T @ weighted


def of_model(folder: Path, text: Path | None, count: int) -> Iterator[Problem]:
    """Every expert tensor."""
    checkpoint = open_checkpoint(folder)
    model, grams = build_model(checkpoint, EXPERTS), Grams()
    watch(model, sites(checkpoint.weights))
    with torch.no_grad(), recording(grams):
        for i, row in enumerate(rows(folder, text, count=count).ids):
            grams.half = i % 2
            model(input_ids=row[None], use_cache=False)
    for weight in checkpoint.weights:
        if weight.role.is_expert and weight.site is not None:
            each = [grams.sums[weight.site.name, e] for e in range(weight.matrices)]
            first, second = (torch.stack([pair[i] for pair in each]) for i in range(2))
            yield load(weight), first, second
