"""Speed of the dequantize-and-multiply kernels on a GPU, beside bf16 grouped matmul and decoding first.

    python benchmarks/dequant_matmul.py --out benchmarks/results/kernels.md
    python benchmarks/dequant_matmul.py --types Q4_K INT4 --tune  # which tile is fastest, by batch size

Random packed weights of one projection, [experts, out, in]; each token goes to k different experts at
random. A captured CUDA graph takes another copy of the weights every launch, together more than four
times the L2 cache. GB/s counts the bytes of each expert touched once, over the time; "of copy" is
that over what a plain copy reads and writes in the same run.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moequant.check.environment import versions
from moequant.check.speed import TOKENS, copy_bandwidth, measure, time_kernel
from moequant.kernels import KERNEL_FORMATS, Matrix
from moequant.kernels.matrix import INTEGERS
from tests.kernels.reference import random_blocks


def random_matrix(name: str, shape: tuple[int, int, int], group: int) -> Matrix:
    """Weights of random codes."""
    generator = torch.Generator().manual_seed(0)
    if name not in INTEGERS:
        return Matrix(name, shape, random_blocks(name, shape, generator))
    data = torch.randint(
        0, 256, (*shape[:2], shape[2] * INTEGERS[name] // 8), dtype=torch.uint8, generator=generator
    )
    scales = 0.01 + 0.01 * torch.rand(*shape[:2], shape[2] // group, generator=generator)
    return Matrix(name, shape, data, scales.bfloat16())


def tiles(matrix: Matrix, tokens: int) -> Iterator[object]:
    """Sensible tiles of both paths."""
    from moequant.kernels.decoders import DECODERS
    from moequant.kernels.matmul import Tile

    if tokens <= 16:
        for served, rows, columns in itertools.product((1, 2, 4), (1, 2, 4, 8), (8, 16, 32, 64)):
            if served <= tokens:
                yield from (
                    Tile(True, served, rows, columns, warps)
                    for warps in (1, 2, 4, 8)
                    if columns <= 32 * warps
                )
    for served, rows, depth in itertools.product((16, 32, 64, 128), (32, 64, 128), (32, 64, 128)):
        columns = max(1, depth // DECODERS[matrix.format].piece)
        yield from (Tile(False, served, rows, columns, warps) for warps in (4, 8))


def tune(matrix: Matrix, top_k: int, tokens: int) -> list[str]:
    """The three fastest tiles as rows of a table; those that do not fit the GPU are left out."""
    from moequant.kernels.matmul import Tile

    timed = []
    for tile in tiles(matrix, tokens):
        assert isinstance(tile, Tile)
        try:
            timed.append((time_kernel(matrix, top_k, tokens, tile).microseconds, tile))
        except (
            Exception
        ) as error:  # Triton raises its own classes for tiles beyond registers or shared memory
            print(f"{matrix.format} {tokens} {tile}: {type(error).__name__}", file=sys.stderr)
    timed.sort(key=lambda pair: pair[0])
    return [f"| {matrix.format} | {tokens} | {spent:.1f} | `{tile}` |" for spent, tile in timed[:3]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--types", nargs="+", default=list(KERNEL_FORMATS), choices=KERNEL_FORMATS)
    parser.add_argument("--shape", nargs=3, type=int, default=[128, 768, 2048], metavar=("E", "OUT", "IN"))
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--group", type=int, default=128, help="group size of INT4 and INT8")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/dequant_matmul.py times GPU kernels; torch finds no CUDA device here")
    shape = (args.shape[0], args.shape[1], args.shape[2])
    told = ", ".join(f"{name} {version}" for name, version in versions("cuda").items())
    lines = [f"# Kernels, {date.today()}", "", told, ""]
    lines += [f"{shape[0]} experts of {shape[1]} x {shape[2]}, {args.top_k} a token.", ""]
    if args.tune:
        lines += ["| type | tokens | µs | tile |", "|---|--:|--:|---|"]
        for name in args.types:
            for tokens in TOKENS:
                lines += tune(random_matrix(name, shape, args.group), args.top_k, tokens)
    else:
        lines += [f"A copy moves {copy_bandwidth('cuda'):.0f} GB/s (read and written).", ""]
        lines += ["| type | method | tokens | µs | GB/s | of copy |", "|---|---|--:|--:|--:|--:|"]
        for name in args.types:
            for row in measure(random_matrix(name, shape, args.group), args.top_k):
                lines.append(
                    f"| {row['type']} | {row['method']} | {row['tokens']} | {row['µs']:.1f} | "
                    f"{row['GB/s']:.0f} | {row['of copy']:.0%} |"
                )
    text = "\n".join(lines) + "\n"
    print(text)
    if args.out:
        args.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
