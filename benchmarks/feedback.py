"""What rounding under full Hessians saves: output error and time, over the plain search's.

    python benchmarks/feedback.py [--types Q2_K,Q4_K] [--columns 256,1024] [--rounds 0,2]
    python benchmarks/feedback.py --model MODEL --text TEXT [--tokens 8192]

Without a model the inputs are random with shared directions (rank in/4, 64 % of the power) and channels of
uneven size, 4·in tokens an expert; the error is tr(E H Eᵀ) under the Hessian itself. With a model, every
other row of tokens gives the Hessians of its experts (tokens weighted by the square of the router's weight)
and the rest of the rows those that score: a cell is the sum over experts of each (layer, projection), mean
over these. Times are CPU time on one thread, the plain search timed after a first run.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from moequant import formats
from moequant.checkpoint import load, open_checkpoint
from moequant.forward.experts import EXPERTS
from moequant.forward.model import build_model
from moequant.forward.taps import recording, watch
from moequant.rounding import Options, round_to_hessian
from moequant.rounding.feedback import outputs_lost
from moequant.text import corpus
from moequant.text.rows import load_encoder
from tests.rounding.data import correlated

TYPES = "Q2_K,Q3_K,Q4_K,Q5_K,Q6_K,IQ4_XS,IQ4_NL,Q4_0,Q8_0,MXFP4,IQ1_S,IQ2_XXS,IQ2_S,IQ3_XXS,IQ3_S"


class Grams:
    """Sums of g² x xᵀ for every expert, f64, of the rows that calibrate [0] and those that score [1]."""

    def __init__(self) -> None:
        self.half = 0
        self.sums: dict[tuple[str, int], list[Tensor]] = {}

    def dense(self, name: str, inputs: Tensor) -> None: ...

    def routed(self, name: str, hidden: Tensor, index: Tensor, gates: Tensor) -> None: ...

    def expert(self, name: str, expert: int, inputs: Tensor, gates: Tensor) -> None:
        n = inputs.shape[-1]
        zeros = [torch.zeros(n, n, dtype=torch.float64) for _ in range(2)]
        weighted = (inputs * gates[:, None]).double()
        self.sums.setdefault((name, expert), zeros)[self.half] += weighted.T @ weighted


def cases_of(folder: Path, text: str, tokens: int) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """(name, weights [E, out, in], Hessians that calibrate, that score) of every expert tensor."""
    checkpoint = open_checkpoint(folder)
    documents = corpus.read(text)
    rows = corpus.pack(documents, load_encoder(folder), 512, tokens).ids
    model, grams = build_model(checkpoint, EXPERTS), Grams()
    watch(model, checkpoint.weights)
    with torch.no_grad(), recording(grams):
        for i, row in enumerate(rows):
            grams.half = i % 2
            model(input_ids=row[None], use_cache=False)
    for weight in checkpoint.weights:
        if weight.role.is_expert and weight.input is not None:
            each = [grams.sums[weight.input, e] for e in range(weight.n_experts)]
            first, second = (torch.stack([pair[i] for pair in each]) for i in range(2))
            yield weight.name, load(weight), first, second


def timed(work: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """The result and the CPU seconds it took."""
    began = time.process_time()
    result = work()
    return result, time.process_time() - began


def compare(name: str, case: tuple[Tensor, Tensor, Tensor], rounds: list[int]) -> list[float]:
    """[plain's Mw/s, then for each of `rounds` the ratio of the error and of the time]."""
    fmt, (weights, hessian, score) = formats.get(name), case
    diagonal = hessian.diagonal(dim1=1, dim2=2)

    def lost(data: Tensor) -> float:
        return float(sum(outputs_lost(fmt, *each) for each in zip(weights, data, score, strict=True)))

    for _ in range(2):
        data, plain = timed(lambda: formats.quantize(fmt, weights, diagonal, threads=1))
    cells, base = [weights.numel() / plain / 1e6], lost(data)
    for n in rounds:
        options = Options(rounds=n, threads=1)
        data, seconds = timed(lambda o=options: round_to_hessian(fmt, weights, hessian, o).data)  # type: ignore[misc]
        cells += [lost(data) / base, seconds / plain]
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--types", default=TYPES)
    parser.add_argument("--columns", default="256,1024")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--rounds", default="0,2")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--text", default="")
    parser.add_argument("--tokens", type=int, default=8192)
    a = parser.parse_args()
    rounds = [int(n) for n in a.rounds.split(",")]
    if a.model:
        cases = {"experts": [c[1:] for c in cases_of(a.model, a.text, a.tokens)]}
    else:
        cases = {}
        for columns in (int(n) for n in a.columns.split(",")):
            weights, hessian = correlated(a.experts, a.rows, columns, 4 * columns)
            cases[f"in={columns}"] = [(weights, hessian, hessian)]
    print("| type | inputs | plain Mw/s |", *(f"{n} rounds: error | time |" for n in rounds))
    print("|---" * (3 + 2 * len(rounds)) + "|")
    for name in a.types.split(","):
        for label, group in cases.items():
            cells = torch.tensor([compare(name, case, rounds) for case in group]).mean(0).tolist()
            print(f"| {name} | {label} | {cells[0]:.1f} |", end="")
            print(
                *(f" {e:.3f} | {t:.1f}x |" for e, t in zip(cells[1::2], cells[2::2], strict=True)), flush=True
            )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
