"""Other bytes at llama.cpp's types."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import llama, measure
from benchmarks.data import TINY, Beside
from benchmarks.harness import Rows, case
from moequant import Settings, convert

VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "search": {"effort": "fast"},
    "Hessians": {"coupled": False},
    "coupled": {},
    "best": {"effort": "best"},
}
"""Name → settings: each adds a step to the one before."""

PROBES = 16 * 512
"""Tokens that probe a plan; they come on top of those that calibrate."""


@dataclass(frozen=True)
class Rounding(Beside):
    """`types` as in llama.cpp's files; `sizes` such as 3.3M instead, held against its best file."""

    types: tuple[str, ...] = (
        "Q2_K_S", "Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M", "IQ4_XS", "Q5_K_M", "Q6_K",
    )  # fmt: skip
    sizes: tuple[str, ...] = ()
    variants: tuple[str, ...] = ("coupled",)


@case(
    "Other bytes at the types of llama.cpp's files",
    Rounding(**TINY, types=("Q4_0",), variants=("search",)),
    ("llama.cpp",),
)
def rounding(o: Rounding) -> Rows:
    """The same types as llama.cpp's file, other bytes: mean KL divergence in llama.cpp over its own."""
    theirs = llama.Baselines.of(o)
    with tempfile.TemporaryDirectory() as name:
        folder, path = Path(name), Path(name) / "ours.gguf"
        judge = llama.Judge.of(llama.exact_file(o.model, folder), o.ids)
        for each in o.sizes or o.types:
            if o.sizes:
                wanted, its = {"size": each, "calib_tokens": o.tokens - PROBES}, theirs.best(each)
            else:
                plan = llama.plan_of(o.model, each, folder / "plan.json")
                wanted, its = {"plan": plan, "calib_tokens": o.tokens}, theirs.type(each)
            for variant in o.variants:
                given = {"calib": o.calib, "eval_tokens": 0, "overwrite": True, **VARIANTS[variant]}
                _, spent = measure.cpu(partial(convert, o.model, path, Settings(**given, **wanted)))
                yield (
                    {"size" if o.sizes else "type": each, "variant": variant, "bytes": path.stat().st_size}
                    | llama.beside(judge.comparison(path), its)
                    | {"CPU s": spent}
                )
