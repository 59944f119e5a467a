"""One attempt: the command that is run, and what a right answer to it can be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tests.hostile.ground import Ground


@dataclass(frozen=True, slots=True)
class Attempt:
    """The arguments of `moequant`; `refused` where success would be wrong; `what` says what was done; no file
    may grow beyond `room` bytes; `within` is a folder of the bait where the command is asked to write: new
    files may come there, what lies there stays as it is."""

    arguments: list[str]
    what: str
    refused: bool = False
    room: int | None = None
    within: Path | None = None


Maker = Callable[[Random, Ground, Path], Attempt]
"""Makes an attempt in an empty folder of its own. Outputs go to the folder's `out`."""

QUICK = ["--effort", "fast", "--eval-tokens", "0", "--no-self-check"]


def on_model(random: Random, model: Path, what: str, refused: bool = False) -> Attempt:
    """What people do with a model folder: look at it, plan it, convert it."""
    out = model.parent / "out"
    draw = random.random()
    if refused or draw < 0.5:
        return Attempt(
            ["convert", str(model), "-o", str(out / "a.gguf"), "--type", "F32", *QUICK], what, refused
        )
    if draw < 0.6:
        layout = random.choice(["gptq", "awq"])
        return Attempt(["convert", str(model), "-o", str(out / "folder"), "--format", layout,
                        "--group-size", "32", *QUICK, "--dry-run"], what)  # fmt: skip
    if draw < 0.75:
        return Attempt(
            ["convert", str(model), "-o", str(out / "a.gguf"), "--type", "Q4_0", *QUICK, "--dry-run"], what
        )
    if draw < 0.8:
        return Attempt(["fit", str(model), "--vram", "8G", "--ram", "8G", "--ctx", "256"], what)
    return Attempt(["inspect", str(model), *random.choice([[], ["--json"]])], what)
