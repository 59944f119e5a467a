"""Rounding's loops in C beside the same loops by torch."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.cases.streaming import alone
from benchmarks.harness import Rows, case
from moequant import formats, native
from moequant.formats import engine
from moequant.rounding import Options, round_to_hessian

FORMATS = ("Q4_K", "Q6_K", "IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ1_M")


@dataclass(frozen=True)
class Loops:
    """Experts [rows, columns] whose inputs were so many tokens, rounded to each format in turn."""

    formats: tuple[str, ...] = FORMATS
    experts: int = 2
    rows: int = 1536
    columns: int = 1024
    tokens: int = 1024
    turns: int = 2


@case("Rounding's loops in C and by torch", Loops(("Q4_0", "IQ2_S"), 1, 32, 256, 64, 1))
def loops(o: Loops) -> Rows:
    """CPU nanoseconds of one thread for a weight that is rounded under a Hessian at default effort, and what
    its expert lost of its outputs' energy; each in a fresh process, C and torch in turn. The plain search is
    compiled on both sides, and before."""
    for name in o.formats:
        for turn in range(o.turns):
            by_c, by_torch = (alone(measured, replace(o, formats=(name,)), there) for there in (True, False))
            ratio = {"torch over C": by_torch["ns"] / by_c["ns"]}
            both = {"C, ns": by_c["ns"], "torch, ns": by_torch["ns"]}
            lost = {"lost by C": by_c["lost"], "lost by torch": by_torch["lost"]}
            yield {"format": name, "turn": turn + 1} | both | ratio | lost


def settle(there: bool) -> None:
    """Whether this process has the loops: it asks once, and without a compiler there are none."""
    usual = dict(os.environ)
    os.environ |= {} if there else {"PATH": "", "CC": "none"}
    assert (native.loops(torch.device("cpu")) is not None) == there
    os.environ |= usual


def measured(o: Loops, there: bool) -> dict[str, Any]:
    """One format, with the loops or without."""
    settle(there)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    mixed = torch.eye(o.columns) + torch.randn(o.columns, o.columns) / o.columns**0.5
    inputs = torch.randn(o.experts, o.tokens, o.columns) @ mixed
    weights, hessians = 0.02 * torch.randn(o.experts, o.rows, o.columns), inputs.mT @ inputs
    options, fmt = Options(threads=1, of=engine.COMPILE_FROM), formats.get(o.formats[0])
    round_to_hessian(fmt, weights[:1], hessians[:1], options)
    began = time.process_time()
    found = round_to_hessian(fmt, weights, hessians, options)
    spent = time.process_time() - began
    error = weights - formats.dequantize(fmt, found.data)
    lost = ((error @ hessians) * error).sum() / ((weights @ hessians) * weights).sum()
    return {"ns": 1e9 * spent / weights.numel(), "lost": float(lost)}
