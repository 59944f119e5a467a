"""Folders with a scheme for every layer beside folders of one scheme."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks import measure
from benchmarks.cases.served import Served, figures, ours, scored, uniform
from benchmarks.data import CALIB, DEMO, EVAL, MIX, ONE_TEXT
from benchmarks.harness import Rows, case

RATIOS = ("of the best uniform", "± of it", "of a uniform one of its bytes", "± of that")
"""What is said of a mixed folder."""


@dataclass(frozen=True)
class Mixed:
    """`uniform` are schemes, each for the experts and for all linears; the bytes of the `mixed` among them
    are spent anew, on schemes of `menu`. What is made stays in `cache`, where `served` finds its own too."""

    model: Path = MIX
    calib: Path = CALIB
    eval: Path = EVAL
    cache: str = "/tmp/moequant-served"
    tokens: int = 16_384
    eval_tokens: int = 61_440
    uniform: tuple[str, ...] = (
        "W3A16", "W4A16", "W4A16_G32", "NVFP4A16", "W5A16", "W6A16", "FP8_BLOCK", "W8A16",
    )  # fmt: skip
    mixed: tuple[str, ...] = ("W4A16", "W5A16", "W6A16", "FP8_BLOCK")
    menu: str = "W3A16,W4A16,W4A16_G32,NVFP4A16,W5A16,W6A16,W8A16,FP8_BLOCK,FP8_DYNAMIC"


SMOKE = Mixed(
    *(DEMO, ONE_TEXT, ONE_TEXT, "/tmp/moequant-smoke/served", 1024, 1024, ("W4A16", "W8A16"), ("W8A16",)),
    menu="W4A16,W8A16",
)


@case("Folders with a scheme for every layer beside folders of one scheme", SMOKE)
def mixed(o: Mixed) -> Rows:
    """In a mixed folder the scheme of every layer is chosen, attention's with it. A uniform one has one
    scheme for the experts, or for all linears. `moequant compare` scores all of them; ± is paired by token.

    A mixed folder stands against the best uniform one that is no larger, and against what a uniform one of
    its bytes would lose: the logarithm of KL on the lowest straight line between one that is smaller and one
    that is larger."""
    Path(o.cache).mkdir(parents=True, exist_ok=True)
    like = Served(o.model, o.calib, o.eval, None, o.cache, o.tokens, o.eval_tokens)
    alike = {}
    for scheme in o.uniform:
        everywhere = ("--scheme", scheme, "--quantize-attention")
        alike[scheme] = uniform(like, scheme)
        alike[f"{scheme}, all linears"] = ours(like, f"{scheme}-attention", *everywhere)
    chosen = {}
    for name in (name for name in alike if name.partition(",")[0] in o.mixed):
        kept = "mixed-" + name.replace(", all linears", "-attention")
        size = ("--size", str(alike[name].bytes), "--schemes", o.menu)
        chosen[f"mixed, bytes of {name}"] = ours(like, kept, *size)
    made = alike | chosen
    measured = dict(zip(made, scored(like, list(made.values())), strict=True))
    points = {folder.bytes: measured[name].scores.kl for name, folder in alike.items()}
    for name, folder in sorted(made.items(), key=lambda item: item[1].bytes):
        found: dict[str, float | None] = dict.fromkeys(RATIOS)
        if name in chosen:
            mine = measured[name].scores.kl
            best = min((kl for size, kl in points.items() if size <= folder.bytes), key=lambda kl: kl.mean())
            ratios = (*measure.ratio(mine, best), *measure.below(mine, folder.bytes, points))
            found = dict(zip(RATIOS, ratios, strict=True))
        yield {"folder": name} | figures(folder, measured[name]) | found
