"""Folders of one scheme by three tools and by us."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import measure
from benchmarks.data import CALIB, DEMO, EVAL, MIX, ONE_TEXT, rows
from benchmarks.harness import Rows, case
from benchmarks.measure import ended
from benchmarks.record import ROOT
from moequant.commands.compare import CompareSettings, run
from moequant.evaluate import Measured
from moequant.text.rows import ROW

RIVALS = ("rtn", "gptq", "autoround")
TOOL = Path(__file__).parents[1] / "served_tool.py"


@dataclass(frozen=True)
class Served:
    """`tools` is the Python of an environment with llm-compressor and AutoRound; without one there are only
    our folders. `rivals` are tools of it, of one scheme alone where that stands behind (`gptq-W4A16`). What
    is made stays in `cache`, and is found there again."""

    model: Path = MIX
    calib: Path = CALIB
    eval: Path = EVAL
    tools: Path | None = Path.home() / ".cache/moequant/tools/bin/python"
    cache: str = "/tmp/moequant-served"
    tokens: int = 16_384
    eval_tokens: int = 61_440
    rivals: tuple[str, ...] = RIVALS
    schemes: tuple[str, ...] = ("W4A16", "W4A16_G32", "W3A16", "NVFP4A16", "FP8_BLOCK")


SMOKE = Served(DEMO, ONE_TEXT, ONE_TEXT, None, "/tmp/moequant-smoke/served", 1024, 1024, (), ("W8A16",))


@dataclass(frozen=True)
class Made:
    """A folder, and what the process that made it took: CPU seconds and bytes at most."""

    path: Path
    cpu: float
    peak: int

    @property
    def bytes(self) -> int:
        """Of its weights."""
        return sum(file.stat().st_size for file in self.path.glob("*.safetensors"))


@case("Folders that people serve: llm-compressor's RTN and GPTQ, AutoRound, ours", SMOKE)
def served(o: Served) -> Rows:
    """Every tool quantizes the experts and leaves the rest, calibrated on the same rows of tokens, all else
    by its default, in a process of its own with one thread; CPU seconds and memory are of all of it, imports
    too. `moequant compare` scores the folders; ± is paired by token. The ratio is to the best of the others.

    The environment of the tools: `python -m venv ~/.cache/moequant/tools`, and in it `pip install
    torch==2.13.0+cpu llmcompressor==0.14.0.1`, which brings AutoRound 0.15.1 and transformers 5.17."""
    cache = Path(o.cache)
    cache.mkdir(parents=True, exist_ok=True)
    for scheme in o.schemes:
        rivals = [tool for tool in RIVALS if {tool, f"{tool}-{scheme}"} & set(o.rivals) and o.tools]
        made = {tool: theirs(o, tool, scheme) for tool in rivals}
        yield from table(o, scheme, made | {"ours": uniform(o, scheme)})


def table(o: Served, scheme: str, made: dict[str, Made]) -> Rows:
    """The tools' folders of one scheme side by side."""
    measured = scored(o, list(made.values()))
    others = [one for tool, one in zip(made, measured, strict=True) if tool != "ours"]
    best = min(others, key=lambda one: one.comparison.kl_mean.value) if others else None
    for (tool, folder), one in zip(made.items(), measured, strict=True):
        ratio = measure.ratio(one.scores.kl, best.scores.kl) if best else (None, None)
        yield {
            "scheme": scheme,
            "tool": tool,
            **figures(folder, one),
            "of the best other": ratio[0],
            "± of it": ratio[1],
            "CPU s": folder.cpu,
            "peak MB": folder.peak / 1e6,
        }


def figures(folder: Made, one: Measured) -> dict[str, float | int]:
    """What both tables say of a folder."""
    found = one.comparison
    return {
        "bytes": folder.bytes,
        "KL": found.kl_mean.value,
        "±": found.kl_mean.error,
        "same top %": 100 * found.same_top,
        "perplexity": found.perplexity.value,
    }


def scored(o: Served, made: Sequence[Made]) -> tuple[Measured, ...]:
    """Folders against the model on the text that judges."""
    wanted = CompareSettings(eval=o.eval, eval_tokens=o.eval_tokens)
    return run(o.model, [each.path for each in made], wanted).measured


def uniform(o: Served, scheme: str) -> Made:
    """Our folder of one scheme, by the defaults."""
    return ours(o, f"ours-{scheme}", "--scheme", scheme)


def ours(o: Served, name: str, *options: str) -> Made:
    """Our folder of that name and with these options."""
    text = ["--calib", str(o.calib), "--calib-tokens", str(o.tokens), "--eval-tokens", "0"]
    return process(
        Path(o.cache) / name,
        lambda out: [
            *(sys.executable, "-m", "moequant", "convert", str(o.model), "-o", str(out)),
            *("--format", "safetensors", *options, *text),
        ],
    )


def theirs(o: Served, tool: str, scheme: str) -> Made:
    """Another tool's folder, from the rows of tokens that calibrate ours."""
    ids = Path(o.cache) / "rows.json"
    ids.write_text(json.dumps(rows(o.model, o.calib, count=o.tokens // ROW).ids.tolist()))
    return process(
        Path(o.cache) / f"{tool}-{scheme}",
        lambda out: [str(o.tools), str(TOOL), str(o.model), str(out), tool, scheme, str(ids)],
    )


def process(out: Path, command: Callable[[Path], list[str]]) -> Made:
    """The folder that a command makes at `out`, or made before; what it took lies beside."""
    told = out.with_name(out.name + ".json")
    if not told.exists():
        one_thread = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        with out.with_name(out.name + ".log").open("w") as log:
            started = subprocess.Popen(
                command(out), env=os.environ | one_thread, stdout=log, stderr=subprocess.STDOUT
            )
            status, used, peak = ended(started.pid)
        if status:
            raise RuntimeError(f"{out}: could not be made; {log.name} says why")
        told.write_text(json.dumps([used.ru_utime + used.ru_stime, peak]))
    cpu, peak = json.loads(told.read_text())
    return Made(out, cpu, peak)
