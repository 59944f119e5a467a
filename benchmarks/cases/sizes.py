"""Several sizes in one run beside a run for each."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from benchmarks.data import DEMO, MIX
from benchmarks.harness import Rows, case
from moequant import Settings
from moequant.commands.convert import convert_all
from moequant.formats import Effort

BOTH = ("one run", "a run each")


@dataclass(frozen=True)
class Sizes:
    """A model, what is made of it at which efforts, and how often each side has its turn."""

    model: Path = MIX
    types: tuple[str, ...] = ("Q2_K", "Q3_K_M", "Q4_K_M", "IQ2_S")
    efforts: tuple[Effort, ...] = ("fast", "default")
    tokens: int = 8_192
    eval_tokens: int = 4_096
    turns: int = 2


@case(
    "Several sizes in one run beside a run for each",
    Sizes(DEMO, ("Q4_K_M", "Q8_0"), ("fast",), 1024, 1024, 1),
)
def sizes(o: Sizes) -> Rows:
    """All types in one conversion, then a conversion for each, in turn in one process, so that the start of
    Python and torch counts for neither. Figures are CPU seconds by stage, those of the self-check's processes
    included; the ratio is the one run over the others together. The files of both have the same bytes, or the
    case fails. A first run is not counted: torch may compile in it. Rows of a turn first, then all turns."""
    with tempfile.TemporaryDirectory(prefix="moequant-sizes-") as name:
        for effort in o.efforts:
            (folder := Path(name) / effort).mkdir()
            for found in turns(o, effort, folder):
                yield {"effort": effort} | found


def turns(o: Sizes, effort: Effort, folder: Path) -> Rows:
    """The rows of one effort."""
    whole = {side: Counter[str]() for side in BOTH}
    made(o, effort, o.types, folder / "first")
    for turn in range(o.turns):
        spent, files = made(o, effort, o.types, folder / f"{turn}")
        others, alone = Counter[str](), dict[str, str]()
        for kind in o.types:
            more, file = made(o, effort, (kind,), folder / f"{turn}-{kind}")
            others.update(more)
            alone |= file
        assert files == alone, f"other bytes: {files} and {alone}"
        yield {"turn": turn + 1} | row("all", spent, others)
        for side, found in zip(BOTH, (spent, others), strict=True):
            whole[side].update(found)
    for stage in (*whole[BOTH[0]], "all"):
        yield {"turn": "all"} | row(stage, *whole.values())


def row(stage: str, spent: Counter[str], others: Counter[str]) -> dict[str, str | float]:
    """CPU seconds of both in one stage, or in all of them."""
    one, each = (found.total() if stage == "all" else found[stage] for found in (spent, others))
    return {"stage": stage, "one run, CPU s": one, "a run each, CPU s": each, "ratio": one / each}


def made(o: Sizes, effort: Effort, types: Sequence[str], folder: Path) -> tuple[Counter[str], dict[str, str]]:
    """CPU seconds by stage of one conversion, and the digests of its files by name."""
    folder.mkdir()
    settings = Settings(",".join(types), calib_tokens=o.tokens, eval_tokens=o.eval_tokens, effort=effort)
    report = convert_all(o.model, folder / "{type}.gguf", settings).reports[0]
    spent = Counter[str]()
    for cost in report.stages:
        spent[cost.name.split()[0]] += cost.cpu_seconds  # "quantize Q2_K" where there are several
    return spent, {file.name: sha256(file.read_bytes()).hexdigest() for file in folder.glob("*.gguf")}
