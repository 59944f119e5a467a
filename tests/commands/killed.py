"""`python -m tests.commands.killed MODEL TEXT WORK KINDS`: conversions in forked children, killed.

KINDS is JSON: when to kill a conversion of that kind, several times. Each is killed after a share of its file
operations, or before it opens a file of the journal, and given again; prints, by kind, what the undisturbed
run did, what each left, and what its second run did.

A process of its own, that imports once and forks before torch has started a thread. A hook on all modules
counts which decoder layers are called.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from typer.testing import CliRunner

import moequant.commands.convert  # noqa: F401  before the forks
from moequant.checkpoint import open_checkpoint
from moequant.cli import app
from moequant.containers.gguf.container import GgufContainer
from moequant.forward.model import empty_model
from moequant.plan.document import plan_from_types, to_json
from tests.strike import watch

LAYERS = 3
"""Decoder layers of the model; it is small so that a conversion takes seconds."""

SMALL = {
    "num_hidden_layers": LAYERS,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}

KINDS = {
    "gguf": ("-o", "{out}/a.gguf", "--plan", "{plan}", "--imatrix-out", "{out}/i.gguf"),
    "folder": ("-o", "{out}/f", "--format", "safetensors", "--group-size", "32"),
    "sizes": ("-o", "{out}/a-{type}.gguf", "--type", "Q4_K_M,Q5_K_M", "--effort", "fast",
              "--split-size", "100K", "--card", "{out}/README.md"),
    "measured": ("-o", "{out}/a.gguf", "--type", "Q4_0"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Told:
    """How a run ended: its exit code, file operations, those that first opened a file of the journal, by its
    name, and the decoder layers that it called, in order."""

    code: int
    steps: int
    opened: dict[str, int]
    layers: list[int]
    says: str


@dataclass(frozen=True, slots=True)
class Kill:
    """What was left, parts of the output that was under way counted, and how the second run went."""

    code: int
    parts: int
    again: Told
    same: bool
    state: list[str]


def run(arguments: Sequence[str], log: Path, kill_at: int | None = None) -> Told:
    """The command in a child; a killed one tells only its code."""
    log.unlink(missing_ok=True)
    child = os.fork()
    if not child:
        try:
            _child(arguments, log, kill_at)
        finally:
            os._exit(99)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return Told(**json.loads(log.read_text())) if log.exists() else Told(code, 0, {}, [], "")


def _child(arguments: Sequence[str], log: Path, kill_at: int | None) -> None:
    steps, opened, layers = 0, dict[str, int](), list[int]()

    def count() -> None:
        nonlocal steps
        steps += 1
        if steps == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def called(module: torch.nn.Module, args: object) -> None:
        if hasattr(module, "layer_idx"):
            layers.append(int(module.layer_idx))

    def seen(event: str, args: tuple[object, ...]) -> None:
        _, inside, name = str(args[0]).partition(".journal/") if event == "open" else ("", "", "")
        if inside:
            opened.setdefault(name.replace("/.", "/").partition(".")[0], steps)

    torch.nn.modules.module.register_module_forward_pre_hook(called)
    watch(count)
    sys.addaudithook(seen)
    result = CliRunner().invoke(app, arguments)
    told = Told(result.exit_code, steps, opened, layers, result.stderr)
    log.write_text(json.dumps(asdict(told)))
    os._exit(result.exit_code)


def state(folder: Path) -> dict[str, bytes]:
    """What lies in a folder."""
    files = (path for path in sorted(folder.rglob("*")) if not path.is_dir())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def parts(left: Sequence[str]) -> int:
    """Finished parts of the last output that has some."""
    every = [name.split("/")[-2] for name in left if "/part-" in name]
    return every.count(max(every)) if every else 0


def when(whole: Told, told: str) -> int:
    """The file operation that is meant: a share of all, or the name of a file of the journal."""
    return whole.opened[told] if told in whole.opened else max(1, int(whole.steps * float(told)))


def main(model: Path, text: str, work: Path, kind: str, every: Sequence[str]) -> tuple[Told, list[Kill]]:
    """The undisturbed run, and every kill of that kind, in a folder that is made."""
    work.mkdir()
    weights = GgufContainer(open_checkpoint(model)).checkpoint.weights
    kept = {weight.name for weight in weights if weight.role.keeps_precision or len(weight.shape) < 2}
    types = {weight.name: "F32" if weight.name in kept else "Q4_0" for weight in weights}
    (work / "plan.json").write_text(to_json(plan_from_types(weights, types)))

    def arguments(out: Path) -> list[str]:
        out.mkdir(exist_ok=True)
        own = [
            each.replace("{out}", str(out)).replace("{plan}", str(work / "plan.json")) for each in KINDS[kind]
        ]
        return ["convert", str(model), *own, "--calib", text, "--calib-tokens", "1024", "--eval-tokens", "0",
                "--no-self-check"]  # fmt: skip

    log = work / "log"
    whole = run(arguments(work / "whole"), log)
    assert whole.code == 0, whole.says
    found = []
    for number, told in enumerate(every):
        out = work / str(number)
        killed = run(arguments(out), log, when(whole, told))
        left = sorted(state(out))
        again = run(arguments(out), log)
        same = state(out) == state(work / "whole")
        found.append(Kill(killed.code, parts(left), again, same, sorted(state(out))))
    return whole, found


if __name__ == "__main__":
    model_, text_, work_, kinds = sys.argv[1:]
    empty_model(open_checkpoint(Path(model_)))  # what transformers loads for it takes every fork seconds
    told = {}
    for kind_, whens in json.loads(kinds).items():
        undisturbed, kills = main(Path(model_), text_, Path(work_) / kind_, kind_, whens)
        told[kind_] = [asdict(undisturbed), [asdict(each) for each in kills]]
    print(json.dumps(told))
