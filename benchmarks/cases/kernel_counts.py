"""The machine instructions of the kernels."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import Rows, case
from moequant.kernels import KERNEL_FORMATS

RECORDED = Path(__file__).parents[2] / "tests/kernels/counts.json"


@dataclass(frozen=True)
class Counts:
    """`types` are formats, and F16: Triton's own product of weights that need no decoding, for many tokens.

    `tokens` an expert; `targets` are NVIDIA's compute capabilities and AMD's gfx942. With `record` the counts
    at one token an expert become those that `tests/kernels/test_budget.py` compares with.
    """

    types: tuple[str, ...] = (*KERNEL_FORMATS, "F16")
    tokens: tuple[int, ...] = (1, 4, 16, 64)
    targets: tuple[str, ...] = ("80", "86", "89", "90", "100", "120", "gfx942")
    record: bool = False


@case("What the kernels cost in machine instructions", Counts(("IQ4_XS",), (1,), ("90",)), ("triton",))
def kernel_counts(o: Counts) -> Rows:
    """Kernels are compiled for GPUs that need not be here, and the instructions of their main loops counted,
    all per weight. "bound" is the share of the named GPU's bandwidth at which its busiest unit ("by") is
    always busy: necessary, not sufficient, because latencies, caches and how loads join are not in it."""
    from benchmarks.kernel_counts import PLAIN, count  # only where there is Triton

    found: dict[str, float | str] = {}
    for target in o.targets:
        for tokens in o.tokens:
            for name in o.types:
                if name == PLAIN and tokens < 16:
                    continue
                row = count(name, tokens, target)
                found |= {name: round(row["instructions"], 3), "triton": row["triton"]} if tokens == 1 else {}
                yield row
    if o.record:
        RECORDED.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n", encoding="utf-8")
