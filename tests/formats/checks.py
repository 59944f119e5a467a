"""What every block format must satisfy, measured against gguf-py and ggml."""

from __future__ import annotations

from functools import cache

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from moequant.formats.base import Effort, Format
from tests.formats import ggml


def weights(kind: str, rows: int = 16, columns: int = 1024, seed: int = 0) -> Tensor:
    """f32 [rows, columns]: "gauss" or "heavy" tails, uneven rows and columns, a few outliers."""
    r = np.random.default_rng(seed)
    x = r.standard_normal((rows, columns)) if kind == "gauss" else r.standard_t(4, (rows, columns))
    x = 0.02 * x * np.exp(0.2 * r.standard_normal((rows, 1)) + 0.2 * r.standard_normal((1, columns)))
    x[r.random(x.shape) < 0.003] *= 4
    return torch.from_numpy(x.astype(np.float32))


def importances(kind: str, columns: int = 1024, seed: int = 1) -> Tensor:
    """f32 [columns]: "flat", "mild" (log-normal) or "spiky" (log-normal, 8 channels times 100)."""
    r = np.random.default_rng(seed)
    v = np.exp({"flat": 0.0, "mild": 0.5, "spiky": 1.0}[kind] * r.standard_normal(columns))
    if kind == "spiky":
        v[r.integers(0, columns, 8)] *= 100
    return torch.from_numpy(v.astype(np.float32))


def objective(fmt: Format, x: Tensor, importance: Tensor) -> Tensor:
    """Weights of the squared error that the format minimises by default, f32 [blocks, block]."""
    blocks = x.reshape(-1, fmt.block)
    square = blocks.square()
    w = importance.expand_as(x).reshape(-1, fmt.block)
    if not fmt.magnitude:
        return w.contiguous()
    return w * (fmt.spread * square.mean(-1, keepdim=True) + square) ** (fmt.magnitude / 2)


def loss(w: Tensor, x: Tensor, q: Tensor) -> float:
    """sum(w (x - q)²) in f64."""
    return float((w.double() * (x.double() - q.double()).square()).sum())


def ratio_to_ggml(fmt: Format, kind: str, importance: str, effort: Effort = "default") -> float:
    """Error of our encoder over ggml's with the same importance, on the objective of the format."""
    x, v = weights(kind), importances(importance)
    w, blocks = objective(fmt, x, v), x.reshape(-1, fmt.block)
    return loss(w, blocks, fmt.decode(fmt.encode(blocks, w, effort))) / lost_by_ggml(fmt, kind, importance)


@cache
def lost_by_ggml(fmt: Format, kind: str, importance: str) -> float:
    """The error that ours is held against; ggml's own search of grids takes seconds."""
    x, v = weights(kind), importances(importance)
    w, blocks = objective(fmt, x, v), x.reshape(-1, fmt.block)
    return loss(w, blocks, fmt.decode(ggml.quantize(fmt, x, v).reshape(-1, fmt.block_bytes)))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, any NaN being equal to any other."""
    nan = torch.isnan(a)
    same = a.view(torch.int32) == b.view(torch.int32)
    return a.shape == b.shape and bool((same | (nan & torch.isnan(b))).all())


def decodes_like_others(fmt: Format, packed: Tensor) -> bool:
    """Our decoder against ggml's and gguf-py's on uint8 [n, block_bytes]."""
    ours = fmt.decode(packed)
    kind = gguf.GGMLQuantizationType(fmt.ggml_type)
    # Scales of random bytes may be NaN or infinite; numpy warns where it multiplies them.
    with np.errstate(all="ignore"):
        python = gguf.quants.dequantize(packed.numpy(), kind).reshape(ours.shape)
    return same_bits(ours, ggml.dequantize(fmt, packed)) and same_bits(ours, torch.from_numpy(python))


def random_bytes(fmt: Format, n: int = 512, seed: int = 2) -> Tensor:
    """uint8 [n, block_bytes]."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (n, fmt.block_bytes), np.uint8))


def nasty_blocks(fmt: Format) -> dict[str, tuple[Tensor, Tensor]]:
    """name -> (x, w), each [4, block]: inputs on which a careless search divides by zero or overflows."""
    g = torch.Generator().manual_seed(3)
    normal = torch.randn(4, fmt.block, generator=g)
    flat = torch.ones_like(normal)
    outlier = normal * 1e-3
    outlier[:, 5] = 1e4
    spike = torch.full_like(normal, 1e-4)
    spike[:, 7] = 1e6
    half_zero = normal.clone()
    half_zero[:, : fmt.block // 2] = 0
    return {
        "zeros": (torch.zeros_like(normal), flat),
        "constant": (torch.full_like(normal, 0.37), flat),
        "negative constant": (torch.full_like(normal, -0.37), flat),
        "subnormal": (normal * 1e-40, flat),
        "below f16": (normal * 1e-9, flat),
        "largest": (torch.full_like(normal, 65504.0) * normal.sign(), flat),
        "outlier": (outlier, flat),
        "one importance": (normal, spike),
        "tiny importance": (normal, flat * 1e-12),
        "huge importance": (normal, flat * 1e12),
        "half zero": (half_zero, flat),
    }


def casualties(fmt: Format, effort: Effort) -> list[str]:
    """The nasty inputs that come out infinite, or worse than stored as zeros.

    All are packed at once, as blocks of a tile are: none may spoil another. A tile of zeros alone is
    packed as well.
    """
    cases = nasty_blocks(fmt)
    x, w = (torch.cat(parts) for parts in zip(*cases.values(), strict=True))
    packed = fmt.encode(x, w, effort)
    assert packed.shape == (len(x), fmt.block_bytes)
    assert packed.dtype == torch.uint8
    zeros = next(iter(cases.values()))
    assert torch.equal(fmt.encode(*zeros, effort), packed[: len(zeros[0])])
    found = zip(cases.items(), fmt.decode(packed).split(4), strict=True)
    return [name for (name, given), q in found if not survives(*given, q)]


def survives(x: Tensor, w: Tensor, q: Tensor) -> bool:
    """Finite, and at least as good as storing zeros."""
    return bool(torch.isfinite(q).all()) and loss(w, x, q) <= loss(w, x, torch.zeros_like(x)) * (1 + 1e-6)


def odd_blocks(block: int) -> tuple[Tensor, Tensor]:
    """Blocks [203, block] and their weights; the first twenty are zeros, single weights, constants, offsets,
    outliers, of one sign, huge or tiny."""
    g = torch.Generator().manual_seed(block)
    x = 0.02 * torch.randn(203, block, generator=g)
    x[0], x[1, 1:], x[2, 3], x[3], x[4] = 0, 0, 5, 0.5, -0.5
    x[5], x[6], x[7], x[8], x[9] = x[5] + 1000, x[6].abs(), -x[7].abs(), 60000, 1e-30
    x[10], x[11, : block // 2], x[12, ::2], x[13] = x[10] * 1e-6, 0, 0, x[13] * 1e5
    return x, torch.rand(203, block, generator=g) + 0.05


def as_good(found: Tensor, known: Tensor, x: Tensor, w: Tensor) -> None:
    """Both lose as much of the blocks [n, block] in all, and neither much more of one of the odd ones than a
    float's own error. Rounded elsewhere, sums may choose another of several that are nearly as good."""
    lost = [((each - x).square() * w).sum(1).double() for each in (found, known)]
    assert float(lost[0][20:].sum() / lost[1][20:].sum()) == pytest.approx(1, abs=2e-3)
    whole = (x.double().square() * w).sum(1)
    assert bool((lost[0] <= 1.1 * lost[1] + 1e-5 * whole).all())
