"""How fast the kernels are, on a GPU: bytes of the experts touched over time, against a copy in the same run.

Decoding is bound by memory, so the figure is GB/s of the *unique* expert bytes that a batch
needs, as a share of what a plain copy moves (bytes read and written). Every launch of a captured
graph takes another copy of the weights, together larger than the L2 cache, so that nothing is
found there by accident.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moequant.kernels import Matrix

if TYPE_CHECKING:
    from moequant.kernels.matmul import Tile

TOKENS = (1, 2, 4, 8, 16, 64, 512)
"""Batch sizes that are timed."""

REPEATS = 20
"""Replays of a captured graph; the median counts."""

L2_TIMES = 4
"""The working set in sizes of the L2 cache."""


@dataclass(frozen=True, slots=True)
class Shape:
    """One projection of an MoE block."""

    experts: int
    top_k: int
    n_out: int
    n_in: int


@dataclass(frozen=True, slots=True)
class Timing:
    """Microseconds of one product of `tokens` tokens; `bytes` are those of the experts touched."""

    format: str
    method: str
    tokens: int
    microseconds: float
    bytes: int

    @property
    def gigabytes_per_second(self) -> float:
        """Unique expert bytes over time."""
        return self.bytes / self.microseconds / 1e3


def copies_of(matrix: Matrix, device: str) -> list[Matrix]:
    """The matrix on the device as often as fills L2_TIMES its cache, at least twice."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    count = max(2, -(-L2_TIMES * cache // matrix.nbytes))
    return [matrix.to(device)] + [
        Matrix(
            matrix.format,
            matrix.shape,
            matrix.data.to(device, copy=True),
            None if matrix.scales is None else matrix.scales.to(device, copy=True),
        )
        for _ in range(count - 1)
    ]


def choices(shape: Shape, tokens: int, seed: int = 0) -> Tensor:
    """i64 [tokens, k]: distinct random experts for each token, the routing of a balanced model."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(tokens, shape.experts, generator=generator).topk(shape.top_k).indices


def time_graph(launches: list[Callable[[], object]]) -> float:
    """Median microseconds of one launch: all are captured in one CUDA graph that is replayed."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, and takes memory, outside the capture
        for launch in launches:
            launch()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    times = []
    for _ in range(REPEATS):
        begin, end = _events()
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(launches))
    return float(sorted(times)[REPEATS // 2])


def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    made = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
    return made[0], made[1]


def copy_bandwidth(device: str, size: int = 1 << 30) -> float:
    """GB/s that a device-to-device copy reads and writes together."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / time_graph([lambda: target.copy_(source)]) / 1e3


def time_kernel(
    matrix: Matrix, top_k: int, tokens: int, tile: Tile | None = None, device: str = "cuda"
) -> Timing:
    """Our kernel, with its own choice of tile or the given one."""
    from moequant.kernels.matmul import choose_tile, grouped_matmul, schedule

    shape = Shape(matrix.shape[0], top_k, matrix.shape[1], matrix.shape[2])
    packed = copies_of(matrix, device)
    x = torch.randn(tokens, shape.n_in, device=device, dtype=torch.bfloat16)
    experts = [choices(shape, tokens, seed).to(device) for seed in range(len(packed))]
    touched = int(experts[0].unique().numel())  # type: ignore[no-untyped-call]
    tile = choose_tile(matrix, tokens, top_k) if tile is None else tile
    # A schedule serves all three products of a block: like the sorting of the others, it is not timed.
    plans = [schedule(chosen, shape.experts, tile) for chosen in experts]

    def ours(i: int) -> Callable[[], object]:
        return lambda: grouped_matmul(
            x, packed[i], experts[i], tile=tile, plan=plans[i], dtype=torch.bfloat16
        )

    spent = time_graph([ours(i) for i in range(len(packed))])
    return Timing(matrix.format, "kernel", tokens, spent, touched * (matrix.nbytes // shape.experts))


def time_others(matrix: Matrix, top_k: int, tokens: int, device: str = "cuda") -> list[Timing]:
    """bf16 grouped matmul of weights of that shape, and decoding followed by it."""
    shape = Shape(matrix.shape[0], top_k, matrix.shape[1], matrix.shape[2])
    x = torch.randn(tokens, shape.n_in, device=device, dtype=torch.bfloat16)
    experts = choices(shape, tokens).to(device)
    touched = int(experts.unique().numel())  # type: ignore[no-untyped-call]
    return [_plain(matrix, x, experts, touched), _decode_first(matrix.to(device), x, experts, touched)]


def _plain(matrix: Matrix, x: Tensor, experts: Tensor, touched: int) -> Timing:
    """torch's grouped matmul on bf16 weights, sorted tokens: the speed of the unquantized model."""
    count, n_out, n_in = matrix.shape
    cache = torch.cuda.get_device_properties(x.device).L2_cache_size
    sets = max(2, -(-L2_TIMES * cache // (count * n_out * n_in * 2)))
    weights = [torch.randn(count, n_out, n_in, device=x.device, dtype=torch.bfloat16) for _ in range(sets)]
    order, ends = _sorted(experts, count)

    def launch(weight: Tensor) -> Callable[[], object]:
        return lambda: grouped(x, weight, order, ends)

    spent = time_graph([launch(weight) for weight in weights])
    return Timing("BF16", "grouped matmul", len(x), spent, touched * n_out * n_in * 2)


def _decode_first(matrix: Matrix, x: Tensor, experts: Tensor, touched: int) -> Timing:
    """Every expert decoded to bf16 by torch, then the same grouped matmul: what fallbacks do."""
    order, ends = _sorted(experts, matrix.shape[0])

    def launch() -> object:
        return grouped(x, matrix.decode().to(torch.bfloat16), order, ends)

    size = touched * (matrix.nbytes // matrix.shape[0])
    return Timing(matrix.format, "decode, then grouped matmul", len(x), _time_eager(launch), size)


def _time_eager(launch: Callable[[], object]) -> float:
    """Median microseconds without a graph: the decoder's threads and tables cannot be captured."""
    launch()
    times = []
    for _ in range(5):
        begin, end = _events()
        begin.record()
        launch()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return float(sorted(times)[2])


def _sorted(experts: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(token of every pair, sorted by expert; i32 ends of each expert's pairs)."""
    flat = experts.reshape(-1)
    order = torch.argsort(flat, stable=True)
    ends = torch.bincount(flat, minlength=count).cumsum(0).to(torch.int32)
    return torch.div(order, experts.shape[1], rounding_mode="floor"), ends


def grouped(x: Tensor, weight: Tensor, token: Tensor, ends: Tensor) -> Tensor:
    """bf16 x [tokens, in], weight [E, out, in] -> [pairs, out], pairs sorted by expert."""
    return torch.nn.functional.grouped_mm(x[token], weight.mT, offs=ends)


def measure(matrix: Matrix, top_k: int, device: str = "cuda") -> list[dict[str, float | int | str]]:
    """A row for each batch size and method, with the share of the copy bandwidth of this run."""
    bandwidth = copy_bandwidth(device)
    rows: list[dict[str, float | int | str]] = []
    for tokens in TOKENS:
        ours = time_kernel(matrix, top_k, tokens, device=device)
        for timing in (ours, *time_others(matrix, top_k, tokens, device)):
            rows.append(
                {
                    "type": timing.format,
                    "method": timing.method,
                    "tokens": tokens,
                    "µs": timing.microseconds,
                    "GB/s": timing.gigabytes_per_second,
                    "of copy": timing.gigabytes_per_second / bandwidth,
                    "copy GB/s": bandwidth,
                }
            )
    return rows
