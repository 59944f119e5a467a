"""Third on a lent GPU: how fast each type is packed, searched plainly and rounded under Hessians.

    python scripts/gpu/encode.py --seconds 220                   # Qwen3-30B's experts, the common types first
    python scripts/gpu/encode.py --device cpu --types Q4_K       # tiny shapes, to find typos

One JSON line a measurement as it ends. "Mw/s" are million weights a second, compilers and one warm run left
out; "same" is the share of rows that the CPU packs to the same bytes, of the first experts. A product of bf16
and one of float32 of the same run say what the device does.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from moequant import formats
from moequant.formats import Format
from moequant.rounding.feedback import round_to_hessian

FIRST = ("Q4_K", "Q6_K", "Q5_K", "Q3_K", "Q2_K", "Q8_0", "IQ4_XS", "IQ3_XXS", "IQ2_XS", "MXFP4", "IQ1_M")
REST = tuple(name for name, fmt in formats.FORMATS.items() if fmt.block > 1 and name not in FIRST)
SHAPE, TINY = (128, 768, 2048), (2, 8, 256)
PRODUCT, TINY_PRODUCT = 8192, 64
COMPARED = 2
"""Experts that the CPU packs too."""


def wait(device: str) -> None:
    """Until the device has done what it was told."""
    if device == "cuda":
        torch.cuda.synchronize()


def timed(work: Callable[[], Tensor], device: str) -> tuple[Tensor, float, float]:
    """The result, the seconds of the first run, and those of the second."""
    seconds = []
    for _ in range(2):
        wait(device)
        begin = time.perf_counter()
        found = work()
        wait(device)
        seconds.append(time.perf_counter() - begin)
    return found, seconds[0], seconds[1]


def products(n: int, device: str) -> Iterator[dict[str, object]]:
    """TFLOP/s of square products."""
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(n, n, device=device, dtype=dtype)
        _, _, seconds = timed(lambda x=x: x @ x, device)
        yield {"product": str(dtype).removeprefix("torch."), "n": n, "TFLOP/s": 2 * n**3 / seconds / 1e12}


def inputs(shape: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Weights bf16 [E, out, in] with heavy tails, importance [E, in], and Hessians f32 [E, in, in]."""
    g = torch.Generator().manual_seed(0)
    experts, _, columns = shape
    weights = torch.randn(shape, generator=g)
    weights *= torch.exp(0.5 * torch.randn(*shape[:2], 1, generator=g))
    fed = torch.randn(columns, 2 * columns, generator=g) * torch.exp(torch.randn(columns, 1, generator=g))
    hessian = (fed @ fed.T / fed.shape[1]).expand(experts, columns, columns)
    return (0.02 * weights).bfloat16(), hessian.diagonal(dim1=1, dim2=2).contiguous(), hessian


def rows(fmt: Format, weights: Tensor, importance: Tensor, hessian: Tensor) -> Iterator[dict[str, object]]:
    """Plain search at two efforts, then rounding under Hessians."""
    device = weights.device.type

    def plain(effort: formats.Effort, x: Tensor, v: Tensor) -> Tensor:
        return formats.quantize(fmt, x, v, effort)

    def rounded(x: Tensor, h: Tensor) -> Tensor:
        return round_to_hessian(fmt, x, h).data

    works: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Tensor]] = {
        "plain, fast": (lambda x, v: plain("fast", x, v), importance),
        "plain, default": (lambda x, v: plain("default", x, v), importance),
        "under Hessians": (rounded, hessian),
    }
    for name, (work, under) in works.items():
        packed, first, second = timed(lambda work=work, under=under: work(weights, under), device)
        here = work(weights[:COMPARED].cpu(), under[:COMPARED].cpu())
        same = (packed[:COMPARED].cpu() == here).all(-1).float().mean()
        yield {
            "type": fmt.name,
            "how": name,
            "first s": first,
            "Mw/s": weights.numel() / second / 1e6,
            "same": float(same),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--types", nargs="+", default=[*FIRST, *REST], choices=[*FIRST, *REST])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--seconds", type=float, default=220.0, help="nothing is started after so long")
    args = parser.parse_args()
    begin, large = time.monotonic(), args.device == "cuda"
    told = {"on": torch.cuda.get_device_name() if large else "CPU", "torch": torch.__version__}
    print(json.dumps(told), flush=True)
    for row in products(PRODUCT if large else TINY_PRODUCT, args.device):
        print(json.dumps(row), flush=True)
    weights, importance, hessian = inputs(SHAPE if large else TINY)
    weights, importance = weights.to(args.device), importance.to(args.device)
    hessian = hessian.to(args.device)
    for name in args.types:
        made = rows(formats.get(name), weights, importance, hessian)
        while time.monotonic() - begin < args.seconds and (row := next(made, None)) is not None:
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
