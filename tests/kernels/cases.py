"""Kernels against float64 products of independently decoded weights: a program, run by `test_kernels.py`.

    TRITON_INTERPRET=1 python -m tests.kernels.cases        # in Triton's interpreter
    python -m tests.kernels.cases --device cuda             # compiled

It prints {case: relative error} as JSON. It runs in a process of its own because Triton decides
when it is imported whether it interprets.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass

import gguf
import numpy as np
import torch
from torch import Tensor

from moequant import formats
from moequant.kernels import KERNEL_FORMATS, Matrix
from moequant.kernels.matrix import INTEGERS
from tests.kernels import reference

VECTOR = "vector"
"""The end of the names of cases for the vector product."""
ROUNDED = ", x rounded alike"


@dataclass(frozen=True, slots=True)
class Case:
    """Weights [experts, rows, columns], random expert choices [tokens, k] or the given kind of them.

    `extreme` rows are of zeros, of the largest scales, of the smallest, and one has a block that is NaN.
    """

    name: str
    format: str
    experts: int
    rows: int
    columns: int
    tokens: int
    k: int
    choice: str = "random"
    dtype: torch.dtype = torch.float32
    extreme: bool = False


def cases() -> list[Case]:
    """Every format on both paths with tails, then every shape of routing on cheap formats."""
    made = []
    for name in KERNEL_FORMATS:
        small = name in INTEGERS or formats.get(name).block == 32
        made.append(Case(f"{name} vector", name, 2, 6, 96 if small else 768, 1, 1, "last", extreme=True))
        made.append(Case(f"{name} tile", name, 1, 60, 96 if small else 256, 17, 1))
    made += [Case(f"Q8_0 {m} tokens", "Q8_0", 1, 30, 160, m, 1) for m in (2, 3, 4, 5, 33, 65)]
    made += [Case(f"INT4 {m} tokens top 3", "INT4", 4, 9, 160, m, 3) for m in (2, 5)]
    for tokens in (1, 12, 40):
        for choice in ("one expert", "all experts", "half empty"):
            made.append(Case(f"Q4_0 {tokens} tokens, {choice}", "Q4_0", 4, 30, 32, tokens, 2, choice))
    made.append(Case("Q4_K tile of two experts", "Q4_K", 2, 70, 256, 40, 1))
    made.append(Case("Q4_K bfloat16 vector", "Q4_K", 2, 8, 512, 2, 1, dtype=torch.bfloat16))
    made.append(Case("Q4_K bfloat16 tile", "Q4_K", 2, 40, 512, 20, 1, dtype=torch.bfloat16))
    made.append(Case("INT4 float16 tile", "INT4", 2, 40, 128, 20, 1, dtype=torch.float16))
    return made


def matrix(case: Case) -> tuple[Matrix, Tensor]:
    """Random codes under sane or extreme scales, and what another decoder makes of them: f64 [E, out, in]."""
    generator = torch.Generator().manual_seed(len(case.name))
    shape = (case.experts, case.rows, case.columns)
    if case.format in INTEGERS:
        bits = INTEGERS[case.format]
        low = -(1 << bits - 1)
        codes = torch.randint(low, -low, shape, generator=generator, dtype=torch.int8)
        group = 64 if case.columns % 64 == 0 else 32
        scales = (0.001 + torch.rand(*shape[:2], shape[2] // group, generator=generator)).bfloat16()
        if case.extreme:
            reference.make_extreme_groups(scales)
        packed = reference.pack_int32(codes, bits).view(torch.uint8)
        spread = scales.double().repeat_interleave(group, 2)
        return Matrix(case.format, shape, packed, scales), codes.double() * spread
    data = reference.random_blocks(case.format, shape, generator)
    if case.extreme:
        reference.make_extreme(case.format, data)
    kind = gguf.GGMLQuantizationType[case.format]
    with np.errstate(all="ignore"):  # of NaN
        decoded = gguf.dequantize(data.reshape(-1, data.shape[-1]).numpy(), kind)
    return Matrix(case.format, shape, data), torch.from_numpy(np.array(decoded)).double().view(shape)


def experts_of(case: Case) -> Tensor:
    """i64 [tokens, k]."""
    generator = torch.Generator().manual_seed(case.tokens)
    if case.choice in ("one expert", "last"):
        return torch.full((case.tokens, case.k), case.experts - 1)
    if case.choice == "all experts":
        return torch.arange(case.experts).expand(case.tokens, -1).contiguous()
    within = case.experts // 2 if case.choice == "half empty" else case.experts
    return torch.randint(0, within, (case.tokens, case.k), generator=generator)


def run(case: Case, device: str) -> dict[str, float]:
    """The error against the product of x as it is; of the vector product also against that of x as it is
    rounded there, from which only sums in f32 may differ."""
    from moequant.kernels.matmul import grouped_matmul

    packed, weights = matrix(case)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(case.tokens, case.columns, generator=generator)
    if not case.extreme:
        x = (x * torch.logspace(-3, 3, case.tokens)[:, None]).to(case.dtype)  # rows of very different size
    experts = experts_of(case)
    got = grouped_matmul(x.to(device), packed.to(device), experts.to(device)).cpu().double()
    found = {case.name: error(case, got, x.double(), weights[experts])}
    if case.name.endswith(VECTOR):
        found[case.name + ROUNDED] = error(case, got, in_pieces(x.float(), case.format), weights[experts])
    return found


def in_pieces(x: Tensor, name: str) -> Tensor:
    """x f32 [tokens, n_in] as the vector product of a format rounds it, f64: to 1/32512 of the largest of its
    piece."""
    from moequant.kernels.decoders import DECODERS

    decoder = DECODERS[name]
    place = torch.arange(x.shape[1])
    span = len(decoder.order)
    source = place // span * span + torch.tensor(decoder.order)[place % span]
    pieces = x[:, source].view(len(x), -1, decoder.piece)
    peak = pieces.abs().amax(-1, keepdim=True)
    code = (pieces * (32512.0 / peak.clamp_min(1e-30)) + 0.5).floor().double()
    made = torch.empty_like(x, dtype=torch.float64)
    made[:, source] = (code * peak.double() / 32512.0).view(len(x), -1)
    return made


def error(case: Case, got: Tensor, x: Tensor, weights: Tensor) -> float:
    """||kernel - reference|| / ||reference|| of the worst token, in f64; infinite where it is not finite.

    x [t, i], weights [t, k, o, i]. Of extreme rows, each row by itself against the size its product usually
    has, sqrt(sum((x · w)²)).
    """
    want = torch.einsum("ti,tkoi->tko", x, weights)
    if case.extreme:
        off = torch.where(got.isnan() & want.isnan() | (got == want), 0.0, (got - want).abs())
        size = torch.einsum("ti,tkoi->tko", x.square(), weights.square()).sqrt()
        # Products of codes may be exactly 0; then so must ours be, and of NaN only NaN is right.
        return float((off / size.nan_to_num(1e-300).clamp_min(1e-300)).nan_to_num(torch.inf).max())
    relative = (got - want).norm(dim=(1, 2)) / want.norm(dim=(1, 2))
    return float(relative.max()) if torch.isfinite(relative).all() else float("inf")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    device = parser.parse_args().device
    torch.set_num_threads(1)
    json.dump({name: found for case in cases() for name, found in run(case, device).items()}, sys.stdout)
