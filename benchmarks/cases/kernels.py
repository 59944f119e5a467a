"""The dequantize-and-multiply kernels on a GPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from benchmarks.harness import Rows, case
from moequant.check.speed import TOKENS, measure, time_kernel
from moequant.kernels import KERNEL_FORMATS, Matrix
from moequant.kernels.matrix import INTEGERS
from tests.kernels.reference import random_blocks

if TYPE_CHECKING:
    from moequant.kernels.matmul import Tile


@dataclass(frozen=True)
class Kernels:
    """`shape` is experts, out, in; `group` the group size of INT4 and INT8."""

    types: tuple[str, ...] = tuple(KERNEL_FORMATS)
    shape: tuple[int, ...] = (128, 768, 2048)
    top_k: int = 8
    group: int = 128

    def matrix(self, name: str) -> Matrix:
        """Random weights of a type."""
        experts, n_out, n_in = self.shape
        return random_matrix(name, (experts, n_out, n_in), self.group)


SMOKE = Kernels(("Q4_K",), (8, 256, 512), 2)


@case("Speed of the kernels beside bf16 and decoding first", SMOKE, ("CUDA",))
def kernels(o: Kernels) -> Rows:
    """Random packed weights of one projection; each token goes to different experts at random. A captured
    CUDA graph takes another copy of the weights every launch, together more than four times the L2 cache.
    GB/s counts the bytes of each expert touched once, over the time; "of copy" is that over what a plain
    copy reads and writes in the same run."""
    for name in o.types:
        yield from measure(o.matrix(name), o.top_k)


@case("The fastest tiles of the kernels, by batch size", SMOKE, ("CUDA",))
def tiles(o: Kernels) -> Rows:
    """The three fastest of all sensible tiles; those that do not fit the GPU are left out."""
    for name in o.types:
        for tokens in TOKENS:
            yield from tune(o.matrix(name), o.top_k, tokens)


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


def sensible(matrix: Matrix, tokens: int) -> Iterator[Tile]:
    """Sensible tiles of both paths."""
    from moequant.kernels.matmul import DECODERS, Tile

    wide = 16 if DECODERS[matrix.format].block == 256 else 128
    if tokens <= 16:
        for served in (1, 2, 4):
            for rows in (4, 8, 16, 32):
                for blocks in (1, 2, 4, 8, 16, 32):
                    if served <= tokens and blocks * DECODERS[matrix.format].width <= 8 * wide * 4:
                        yield from (Tile(True, served, rows, blocks, warps) for warps in (1, 2, 4, 8))
    for served in (16, 32, 64, 128):
        for rows in (32, 64, 128):
            for depth in (32, 64, 128):
                blocks = max(1, depth // DECODERS[matrix.format].width)
                yield from (Tile(False, served, rows, blocks, warps) for warps in (4, 8))


def tune(matrix: Matrix, top_k: int, tokens: int) -> Rows:
    """A row for each of the three fastest tiles."""
    timed = []
    for tile in sensible(matrix, tokens):
        try:
            timed.append((time_kernel(matrix, top_k, tokens, tile).microseconds, tile))
        # Triton raises its own classes for tiles beyond registers or shared memory.
        except Exception as error:
            print(f"{matrix.format} {tokens} {tile}: {type(error).__name__}", file=sys.stderr)
    for spent, tile in sorted(timed, key=lambda pair: pair[0])[:3]:
        yield {"type": matrix.format, "tokens": tokens, "µs": spent, "tile": str(tile)}
