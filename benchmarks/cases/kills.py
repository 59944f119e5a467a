"""Conversions that are killed at random moments, and started again."""

from __future__ import annotations

import os
import random
import shutil
import signal
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from typer.testing import CliRunner

import moequant.commands.convert  # noqa: F401  before the forks
from benchmarks.cases.streaming import alone
from benchmarks.data import ONE_TEXT
from benchmarks.harness import Rows, case
from moequant.cli import app
from tests import models
from tests.commands.killed import state

KINDS = {
    "GGUF": ("made.gguf", "--type", "Q4_K_M"),
    "folder": ("made", "--format", "safetensors"),
}
"""What is made, and how it is asked for."""


@dataclass(frozen=True)
class Kills:
    """So many kills of each kind, of conversions of a random Qwen3-MoE with so many layers and experts."""

    kills: int = 20
    layers: int = 3
    experts: int = 8
    tokens: int = 2048
    seed: int = 0


@case("Conversions killed at random moments", Kills(1, 2, 4, 1024))
def kills(o: Kills) -> Rows:
    """Each conversion runs at default effort in a forked child, its types measured, and gets SIGKILL after a
    random share of the time that an undisturbed one takes. The same command then goes on. "More" is what both
    took together over the undisturbed one: work that was lost, and what opening a model again takes."""
    chance = random.Random(o.seed)
    with tempfile.TemporaryDirectory(prefix="moequant-kills-") as name:
        folder = Path(name)
        model = folder / "model"
        alone(build, model, o.layers, o.experts)  # forks want a process in which torch has started no thread
        for kind in KINDS:
            yield of_kind(o, kind, model, folder / kind, chance)


def build(folder: Path, layers: int, experts: int) -> None:
    """A random model, 256 wide."""
    models.build(folder, "qwen3_moe", num_hidden_layers=layers, num_experts=experts)


def of_kind(
    o: Kills, kind: str, model: Path, folder: Path, chance: random.Random
) -> dict[str, str | int | float]:
    """The row of one kind."""
    made, *options = KINDS[kind]
    text = ["--calib", str(ONE_TEXT), "--calib-tokens", str(o.tokens), "--eval-tokens", "0"]

    def run(out: Path, after: float | None = None) -> tuple[int, float]:
        out.mkdir(parents=True, exist_ok=True)
        return forked(
            ["convert", str(model), "-o", str(out / made), *options, *text, "--no-self-check"], after
        )

    run(folder / "first")  # compiles what is compiled
    code, usual = run(folder / "whole")
    assert code == 0, "the undisturbed conversion failed"
    expected, more, same, killed = state(folder / "whole"), list[float](), 0, 0
    for number in range(o.kills):
        out = folder / str(number)
        code, lost = run(out, chance.uniform(0, usual))
        killed += code == -signal.SIGKILL
        again, rest = run(out) if code else (0, 0.0)
        same += again == 0 and state(out) == expected
        more.append(lost + rest - usual)
        shutil.rmtree(out)
    return {
        "kind": kind,
        "undisturbed s": usual,
        "kills": killed,
        "same bytes": same,
        "more s, median": statistics.median(more),
        "more s, most": max(more),
    }


def forked(arguments: list[str], after: float | None) -> tuple[int, float]:
    """The exit code and the seconds of a command in a child, killed `after` so many."""
    began = time.perf_counter()
    child = os.fork()
    if not child:
        try:
            result = CliRunner().invoke(app, arguments)
            if result.exit_code:
                print(result.stderr, flush=True)
            os._exit(result.exit_code)
        finally:
            os._exit(99)
    if after is not None:
        while time.perf_counter() - began < after:
            time.sleep(0.005)
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, time.perf_counter() - began
