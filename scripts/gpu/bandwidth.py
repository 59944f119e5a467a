"""Second on a lent GPU: the bandwidth each kernel reaches, beside a copy and an f16 product of the same run.

    python scripts/gpu/bandwidth.py --seconds 220                     # one token, then more, Qwen3-30B first
    python scripts/gpu/bandwidth.py --models mixtral --types Q4_K     # a part of it
    TRITON_INTERPRET=1 python scripts/gpu/bandwidth.py --device cpu   # tiny shapes, to find typos

One JSON line a measurement as it ends. GB/s are bytes of the experts touched, each once, over the median time
of a launch in a captured graph; every launch takes other weights, together larger than the cache.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from moequant.check.speed import Shape, choices, copies_of, copy_bandwidth, grouped, time_graph
from moequant.kernels import KERNEL_FORMATS, Matrix
from moequant.kernels.matrix import INTEGERS
from tests.kernels.reference import random_blocks

MODELS = {
    "qwen3-30b": Shape(128, 8, 768, 2048),
    "deepseek-v3": Shape(64, 8, 2048, 7168),
    "mixtral": Shape(8, 2, 14336, 4096),
    "gpt-oss": Shape(32, 4, 2880, 2880),
}
"""The first projection of an expert (of DeepSeek, of a quarter); 256 does not divide gpt-oss' rows."""

FIRST = ("Q4_K", "Q8_0", "INT4", "MXFP4", "Q6_K", "IQ4_XS", "Q5_K", "Q3_K", "Q2_K", "INT8")
TOKENS = (1, 2, 4, 8, 16, 64, 256)
TINY = Shape(3, 2, 8, 256)


@cache
def packed(name: str, shape: Shape) -> Matrix | None:
    """Random weights of a format, None where its blocks do not divide the rows."""
    size = (shape.experts, shape.n_out, shape.n_in)
    generator = torch.Generator().manual_seed(0)
    if name in INTEGERS:
        if shape.n_in % 128:
            return None
        bits = (*size[:2], shape.n_in * INTEGERS[name] // 8)
        data = torch.randint(0, 256, bits, dtype=torch.uint8, generator=generator)
        scales = 0.01 + 0.01 * torch.rand(*size[:2], shape.n_in // 128, generator=generator)
        return Matrix(name, size, data, scales.bfloat16())
    from moequant.formats import FORMATS

    return (
        None if shape.n_in % FORMATS[name].block else Matrix(name, size, random_blocks(name, size, generator))
    )


def timed(launches: list[Callable[[], object]], device: str) -> float:
    """Microseconds of one launch."""
    if device == "cuda":
        return time_graph(launches)
    begin = time.perf_counter()
    launches[0]()
    return (time.perf_counter() - begin) * 1e6


def kernel_time(copies: list[Matrix], x: Tensor, experts: list[Tensor], device: str) -> float:
    """Of our product; the schedule serves three products of a block and is not timed."""
    from moequant.kernels.matmul import choose_tile, grouped_matmul, schedule

    tile = choose_tile(copies[0], len(x), experts[0].shape[1])
    plans = [schedule(chosen, copies[0].shape[0], tile) for chosen in experts]

    def launch(i: int) -> Callable[[], object]:
        return lambda: grouped_matmul(x, copies[i], experts[i], tile=tile, plan=plans[i], dtype=x.dtype)

    return timed([launch(i) for i in range(len(copies))], device)


def plain_time(shape: Shape, x: Tensor, experts: Tensor, device: str) -> float:
    """Of torch's grouped product of bf16 weights; two sets of weights, larger than the cache."""
    size = (shape.experts, shape.n_out, shape.n_in)
    weights = [torch.randn(size, device=device, dtype=torch.bfloat16) for _ in range(2)]
    flat = experts.reshape(-1)
    token = torch.argsort(flat, stable=True) // shape.top_k
    ends = torch.bincount(flat, minlength=shape.experts).cumsum(0).to(torch.int32)

    def launch(weight: Tensor) -> Callable[[], object]:
        return lambda: grouped(x, weight, token, ends)

    return timed([launch(weight) for weight in weights], device)


def measured(names: list[str], shape: Shape, tokens: int, device: str) -> Iterator[dict[str, object]]:
    """A row for bf16, then one for every type."""
    x = torch.randn(tokens, shape.n_in, device=device, dtype=torch.bfloat16)
    chosen = choices(shape, tokens).to(device)
    touched = len(set(chosen.flatten().tolist()))
    spent = plain_time(shape, x, chosen, device)
    yield {"type": "BF16", "µs": spent, "GB/s": touched * shape.n_out * shape.n_in * 2 / spent / 1e3}
    for name in names:
        matrix = packed(name, shape)
        if matrix is None:
            yield {"type": name, "rows": "its blocks do not divide them"}
            continue
        copies = copies_of(matrix, device) if device == "cuda" else [matrix]
        experts = [choices(shape, tokens, seed).to(device) for seed in range(len(copies))]
        spent = kernel_time(copies, x, experts, device)
        size = touched * (matrix.nbytes // shape.experts)
        yield {"type": name, "µs": spent, "GB/s": size / spent / 1e3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    rest = [name for name in KERNEL_FORMATS if name not in FIRST]
    parser.add_argument("--types", nargs="+", default=[*FIRST, *rest], choices=KERNEL_FORMATS)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--seconds", type=float, default=220.0, help="nothing is started after so long")
    args = parser.parse_args()
    begin, told = time.monotonic(), {}
    if args.device == "cuda":
        told = {"on": torch.cuda.get_device_name(), "copy GB/s": copy_bandwidth("cuda")}
    print(json.dumps(told | {"torch": torch.__version__}), flush=True)
    for model in args.models:
        packed.cache_clear()
        for tokens in args.tokens:
            shape = MODELS[model] if args.device == "cuda" else TINY
            rows = measured(args.types, shape, tokens, args.device)
            while time.monotonic() - begin < args.seconds and (row := next(rows, None)) is not None:
                print(json.dumps({"model": model, "tokens": tokens} | row), flush=True)


if __name__ == "__main__":
    main()
