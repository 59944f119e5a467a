"""What the kernels cost in machine instructions, counted without a GPU.

Each kernel is compiled, with the tiles that are shipped, by the compiler that comes with Triton. The main
loop's instructions are sorted by the unit that runs them, and divided by the weights a lane takes in it. From
these follows a bound: the share of a GPU's bandwidth at which its busiest unit is busy all the time. That is
necessary, not sufficient: nothing here knows latencies, caches or how loads of neighbouring lanes join.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moequant.kernels.decoders import DECODERS
from moequant.kernels.matmul import WEIGHT_SCALE, Tile, constants, tile_for
from moequant.kernels.products import tokens_of, vector_product
from moequant.kernels.tiles import tile_product

N_IN = 7168
PLAIN = "F16"
"""Triton's own product of f16 weights, which the one for many tokens is held against."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU: multiprocessors, their clock in GHz, bytes a second; lanes that a unit serves a clock and SM.

    Rates are those of NVIDIA's table of arithmetic throughput; all of them load 32 lanes a clock and SM,
    convert 16, and do 64 in the integer and logic unit. Newer ones may do better than that table says.
    """

    name: str
    processors: int
    clock: float
    bandwidth: float
    float_lanes: int = 128


GPUS = {
    "80": Gpu("A100 80GB", 108, 1.41, 2.04e12, float_lanes=64),
    "86": Gpu("RTX 3090", 82, 1.70, 0.936e12),
    "89": Gpu("RTX 4090", 128, 2.52, 1.008e12),
    "90": Gpu("H200", 132, 1.83, 4.8e12),
    "100": Gpu("B200", 148, 1.85, 8.0e12),
    "120": Gpu("RTX 5090", 170, 2.41, 1.79e12),
}
AMD = "gfx942"
TARGETS = (*GPUS, AMD)

UNITS = {
    "load": ("LDG", "LDS", "STS", "LDC", "STG", "SHFL", "LDL", "STL", "LDSM", "LDGSTS", "STSM", "ATOMS"),
    "convert": ("I2F", "F2I", "F2F", "MUFU"),
    "product": ("IMAD", "IDP", "IDP4A", "IMUL"),
    "float": ("FADD", "FMUL", "FFMA", "HFMA2", "HADD2", "HMUL2"),
    "tensor": ("HMMA", "HGMMA", "WARPGROUP", "UTCHMMA"),
    "none": (
        "BRA",
        "NOP",
        "BSYNC",
        "BSSY",
        "WARPSYNC",
        "BAR",
        "ULDC",
        "UIADD3",
        "R2UR",
        "UMOV",
        "ULEA",
        "UIMAD",
    ),
}
"""Names of machine instructions by unit; whatever is not here (I2FP too) is integer or logic."""


@triton.jit
def f16_product(
    x,
    weight,
    out,
    order,
    expert_of,
    first_of,
    end_of,
    n_out,
    n_in,
    top_k,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """A grouped product of f16 weights as one writes it in Triton: x f16 [tokens, n_in] -> [pairs, n_out]."""
    expert, pair, live = tokens_of(order, expert_of, first_of, end_of, True, TOKENS)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    number = expert.to(tl.int64) * n_out + tl.minimum(n, n_out - 1)
    row = weight + (number * n_in)[:, None]
    x_row = x + (pair // top_k * n_in)[None, :]
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    for start in range(0, n_in, DEPTH):
        k = start + tl.arange(0, DEPTH)
        value = tl.load(x_row + k[:, None], mask=live[None, :] & (k < n_in)[:, None], other=0.0)
        tile = tl.load(row + k[None, :], mask=(k < n_in)[None, :], other=0.0)
        total = tl.dot(tile, value, total)
    to = out + (pair * n_out)[None, :] + n[:, None]
    tl.store(to, total.to(out.dtype.element_ty), mask=live[None, :] & (n < n_out)[:, None])


@dataclass(frozen=True, slots=True)
class Code:
    """A compiled kernel: the names of its main loop's instructions, and what the compiler reports."""

    loop: tuple[str, ...]
    registers: int
    spilled: int
    shared: int
    version: str


def build(name: str, tokens: int, target: str) -> tuple[Code, Tile]:
    """The kernel of a format (or PLAIN) for experts of `tokens` tokens, compiled, and its tile."""
    decoder = DECODERS.get(name, DECODERS["Q8_0"])
    tile = tile_for(decoder, N_IN, tokens)
    amd = target == AMD
    fixed: dict[str, Any] = {"order": None, "first_of": None, "end_of": None} if tokens == 1 else {}
    if name == PLAIN:
        kernel, tile = f16_product, Tile(False, max(tokens, 16), 64, 64, 4)
        fixed |= {"TOKENS": tile.tokens, "ROWS": tile.rows, "DEPTH": tile.columns}
    else:
        per_scale = 128 // decoder.piece if name.startswith("INT") else 0
        fixed |= constants(decoder, per_scale, "gcn" if amd else "ptx", tile)
        fixed |= {} if per_scale or decoder.grid else {"side": None}
        if tile.vector:
            kernel = vector_product
            fixed |= {
                "RECORD": decoder.record,
                "SORTED": tokens > 1,
                "LANES": tile.warps * (64 if amd else 32),
            }
        else:
            kernel = tile_product
            fixed |= {"MIDDLE": decoder.middle, "WEIGHT_SCALE": WEIGHT_SCALE}
    pointers = {
        "out": "*fp32",
        "x_scale": "*fp32",
        "x": "*i32" if tile.vector else "*fp16",
        "weight": "*fp16",
    }
    pointers |= dict.fromkeys(("data", "order", "expert_of", "first_of", "end_of"), "*i32")
    pointers["side"] = "*bf16" if name.startswith("INT") else "*i32"
    types = {k: "constexpr" if k in fixed else pointers.get(k, "i32") for k in kernel.arg_names}
    even = {
        (i,): [["tt.divisibility", 16]]
        for i, k in enumerate(types)
        if types[k][0] == "*" or k in ("n_in", "n_out")
    }
    source = ASTSource(fn=kernel, signature=types, constexprs=fixed, attrs=even)
    where = GPUTarget("hip", AMD, 64) if amd else GPUTarget("cuda", int(target), 32)
    options = {"num_warps": tile.warps, "enable_fp_fusion": True} | ({} if tile.vector else {"num_stages": 2})
    return _read(triton.compile(source, target=where, options=options), amd), tile


def _read(kernel: Any, amd: bool) -> Code:
    if amd:
        text = kernel.asm["amdgcn"]
        found = {k: int(v) for k, v in re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", text)}
        return Code(
            loop_of_amd(text), found["vgpr_count"], found["vgpr_spill_count"], kernel.metadata.shared, "LLVM"
        )
    use = _dump(kernel.asm["cubin"], "-res-usage")
    registers, local = (int(re.search(rf"{k}:([0-9]+)", use)[1]) for k in ("REG", "LOCAL"))
    version = re.search(r"\.version ([0-9.]+)", kernel.asm["ptx"])[1]
    return Code(
        loop_of(_dump(kernel.asm["cubin"], "-sass")),
        registers,
        local,
        kernel.metadata.shared,
        f"PTX {version}",
    )


def _dump(cubin: bytes, flag: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout


def loop_of(sass: str) -> tuple[str, ...]:
    """The instructions of the longest loop, with their modifiers."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]+[^;]*);", sass)
    at = [int(address, 16) for address, _ in lines]
    longest: list[str] = []
    for i, (_, text) in enumerate(lines):
        jump = re.search(r"BRA(?:\.\w+)* .*?0x([0-9a-f]+)", text)
        if jump and int(jump[1], 16) < at[i]:
            body = [text for j, (_, text) in enumerate(lines) if int(jump[1], 16) <= at[j] <= at[i]]
            longest = max(longest, body, key=len)
    return tuple(text.split()[0] for text in longest)


def loop_of_amd(text: str) -> tuple[str, ...]:
    """The same of AMD's assembly: from a label to a branch back to it."""
    longest: list[str] = []
    body: dict[str, list[str]] = {}
    for line in text.splitlines():
        label = re.match(r"(\.LBB\w+):", line)
        word = re.match(r"\s+([sv]_\w+|global_\w+|buffer_\w+|ds_\w+|scratch_\w+)(?:\s+(\S+))?", line)
        if label:
            body[label[1]] = []
        elif word:
            for found in body.values():
                found.append(word[1])
            if word[1].startswith(("s_cbranch", "s_branch")) and word[2] in body:
                longest = max(longest, list(body[word[2]]), key=len)
    return tuple(longest)


def unit_of(name: str) -> str:
    """The unit that runs an instruction of NVIDIA's."""
    return next((unit for unit, names in UNITS.items() if name.split(".")[0] in names), "integer")


def bound(gpu: Gpu, units: Counter[str], bytes_a_lane: float) -> tuple[float, str]:
    """(share of the bandwidth at which the busiest unit is always busy, that unit)."""
    clocks = {
        "issue": units.total() / 128,
        "float": units["float"] / gpu.float_lanes + units["product"] / 64,
        "integer": units["integer"] / 64,
        "load": units["load"] / 32,
        "convert": units["convert"] / 16,
    }
    unit = max(clocks, key=lambda k: clocks[k])
    return gpu.processors * gpu.clock * 1e9 / clocks[unit] * bytes_a_lane / gpu.bandwidth, unit


def count(name: str, tokens: int, target: str) -> dict[str, Any]:
    """One row: what the main loop of a kernel costs."""
    code, tile = build(name, tokens, target)
    decoder = DECODERS.get(name)
    lanes = tile.warps * (64 if target == AMD else 32)
    if tile.vector:
        weights = tile.rows * decoder.piece
    else:
        weights = tile.rows * tile.columns * (decoder.piece if decoder else 1) / lanes
    size = weights * (decoder.bytes / decoder.block if decoder else 2.0)
    row: dict[str, Any] = {
        "target": f"{target} ({GPUS[target].name})" if target in GPUS else target,
        "tokens": tokens,
        "type": name,
        "instructions": len(code.loop) / weights,
    }
    row |= {"a multiply-add": row["instructions"] / tile.tokens}
    if target in GPUS:
        units = Counter(unit_of(op) for op in code.loop)
        row |= {unit: units[unit] / weights for unit in ("integer", "product", "float", "convert", "load")}
        loads = sum(op.startswith(("LDG", "LDGSTS")) for op in code.loop)
        row |= {"bytes a load": size / max(loads, 1)}
        if tile.vector:
            share, unit = bound(GPUS[target], units, size)
            row |= {"bound": share, "by": unit}
    else:
        loads = sum(op.startswith(("global_load", "buffer_load")) for op in code.loop)
        row |= {"bytes a load": size / max(loads, 1)}
    row |= {
        "shared operations": sum(op.startswith(("LDS", "STS", "STSM", "ds_")) for op in code.loop) / weights
    }
    row |= {"registers": code.registers, "spilled": code.spilled, "shared bytes": code.shared}
    return row | {"triton": triton.__version__, "assembly": code.version}
