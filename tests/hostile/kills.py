"""`python -m tests.hostile.kills --kills 300`: commands killed at random moments. Exits 1 when something is
lost.

Every command runs in a forked child that dies by SIGKILL: after a random part of the time that it takes, or
before one of its file operations. Then its outputs are as they were or complete, the same command succeeds
with the bytes of an undisturbed run, and nothing is left of the dead one. Every tenth time, two runs of one
command meet instead.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: forks and its threads do not go together

from moequant.files import RECORD
from tests.hostile.attempts import QUICK
from tests.hostile.ground import Ground, make
from tests.strike import watch

FIRST = "a-00001-of-00002.gguf"
"""The part of a file that readers open."""

State = dict[str, bytes]
"""Files of a folder by their relative names."""


@dataclass(frozen=True, slots=True)
class Command:
    """A command line, `{out}` in it for the folder of its outputs; `varies` names outputs with times in
    them, of which it counts that they are whole. While parts are replaced by as many there is a moment
    without the one `first`."""

    name: str
    arguments: tuple[str, ...]
    varies: tuple[str, ...] = ()
    first: str | None = None


def commands(ground: Ground) -> list[Command]:
    """All that write something, into both containers."""
    model, stats, text = (str(each) for each in (ground.models["qwen3_moe"], ground.files["stats"],
                                                 ground.files["text"]))  # fmt: skip
    calib = ("--calib", text, "--calib-tokens", "1024")
    integers = ("--group-size", "32", *QUICK, "--stats", stats)
    return [
        Command("file", ("convert", model, "-o", "{out}/a.gguf", "--type", "Q4_0", *QUICK, "--stats", stats)),
        Command("folder", ("convert", model, "-o", "{out}/f", "--format", "safetensors", *integers)),
        Command("gptq", ("convert", model, "-o", "{out}/f", "--format", "gptq", *integers)),
        Command("awq", ("convert", model, "-o", "{out}/f", "--format", "awq", *integers)),
        Command("route", ("route", model, *calib, "-o", "{out}/s.safetensors", "--imatrix-out",
                          "{out}/i.gguf", "--picture", "{out}/p.svg"), ("p.svg",)),
        Command("parts", ("convert", model, "-o", "{out}/a.gguf", "--type", "Q4_0", *QUICK, "--stats", stats,
                          "--split-size", "50K", "--card", "{out}/README.md"), first=FIRST),
        Command("plan", ("plan", model, "--bpw", "9", "--stats", stats, "--no-probes", "--effort", "fast",
                         "-o", "{out}/p.json", "--curve", "{out}/p.svg"), ("p.svg",)),
        Command("page", ("convert", model, "-o", "{out}/a.gguf", "--type", "Q4_0", *QUICK, "--stats", stats,
                         "--html", "{out}/a.html"), ("a.html",)),
        Command("rounded", ("convert", model, "-o", "{out}/a.gguf", "--type", "Q4_0", "--eval-tokens", "0",
                            *calib, "--imatrix-out", "{out}/i.gguf")),
        Command("integers", ("convert", model, "-o", "{out}/f", "--format", "safetensors", "--group-size",
                             "32", "--eval-tokens", "0", "--no-self-check", *calib)),
        Command("compare", ("compare", model, str(ground.files["gguf"]), "--eval", text, "--eval-tokens",
                            "1024", "--html", "{out}/c.html"), ("c.html",)),
    ]  # fmt: skip


def forked(arguments: list[str], count: Callable[[], object] | None = None, said: Path | None = None) -> int:
    """The process that runs a command, `count` called before every file operation; its exit code is the
    command's, and what it has said goes to `said`."""
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        from typer.testing import CliRunner

        from moequant.cli import app

        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 1)
        os.dup2(null, 2)
        if count is not None:
            watch(count)
        result = CliRunner().invoke(app, arguments)
        code = result.exit_code
        if said is not None:
            said.write_text(result.output)
    finally:
        os._exit(code)


def ended(child: int) -> int:
    """A child's exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def state(folder: Path) -> State:
    """What lies in a folder."""
    files = (path for path in sorted(folder.rglob("*")) if not path.is_dir())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@dataclass(frozen=True, slots=True)
class Whole:
    """A command that ran to its end: what it made, how long it took, and in how many file operations."""

    made: State
    seconds: float
    steps: int


def run_whole(command: Command, out: Path) -> Whole:
    """Run it once to see."""
    out.mkdir()
    arguments = [each.replace("{out}", str(out)) for each in command.arguments]
    reading, writing = os.pipe()
    begun = time.monotonic()
    child = forked(arguments, lambda: os.write(writing, b"."))
    os.close(writing)
    steps = 0
    while got := os.read(reading, 65536):
        steps += len(got)
    os.close(reading)
    code = ended(child)
    assert code == 0, f"{command.name}: ended with {code} by itself"
    made = state(out)
    assert command.first in {None, *made}, f"{command.name}: made {sorted(made)}"
    return Whole(made, time.monotonic() - begun, steps)


def before(step: int) -> Callable[[], None]:
    """Dies before that file operation."""
    left = step

    def count() -> None:
        nonlocal left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)

    return count


def strike(random: Random, command: Command, whole: Whole, out: Path) -> str | None:
    """Kill the command once and run it again; what is wrong, None when nothing is."""
    replaced = random.random() < 0.5
    out.mkdir()
    arguments = [each.replace("{out}", str(out)) for each in command.arguments]
    if replaced:
        _age(whole, out)
        arguments.append("--overwrite")
    old = state(out)
    if random.random() < 0.5:
        at = random.randrange(1, whole.steps + 1)
        code, when = ended(forked(arguments, before(at))), f"before step {at} of {whole.steps}"
    else:
        wait = random.random() * whole.seconds
        child = forked(arguments)
        time.sleep(wait)
        os.kill(child, signal.SIGKILL)
        code, when = ended(child), f"after {wait:.2f} of {whole.seconds:.2f} s"
    if wrong := _half_written(command, whole, old, state(out)):
        return f"{when}: {wrong}"
    # What was complete before the kill is in the way of a run that may replace nothing, but where it goes on.
    goes_on = command.arguments[0] == "convert" and any(out.glob("*.journal"))
    there = [name for name in whole.made if name in state(out)]
    again = ["--overwrite"] if there and not replaced and not goes_on else []
    said = out.with_name(f"{out.name}.said")
    if code and (failed := ended(forked([*arguments, *again], said=said))):
        last = said.read_text().strip().splitlines()[-1:] if said.exists() else []
        return f"{when}: running it again ends with {failed}, {last}"
    left, temporary = state(out), sorted(Path(tempfile.gettempdir()).glob("*"))
    if left.keys() != whole.made.keys() or _names(out) != _parents(whole.made):
        return f"{when}: left {sorted(left.keys() ^ whole.made.keys()) or sorted(_names(out))}"
    if temporary:
        return f"{when}: left {temporary[:3]} in TMPDIR"
    off = [name for name in left if name not in command.varies and left[name] != whole.made[name]]
    return f"{when}: {off[0]} is another file than without a kill" if off else None


def race(random: Random, command: Command, whole: Whole, out: Path) -> str | None:
    """Two runs of a command to the same outputs: one is whole, the other succeeds as well or is refused."""
    out.mkdir()
    arguments = [each.replace("{out}", str(out)) for each in command.arguments]
    arguments += random.choice([[], ["--overwrite"]])
    first = forked(arguments)
    time.sleep(random.random() * whole.seconds / 2)
    codes = {ended(forked(arguments)), ended(first)}
    if not codes <= {0, 1} or 0 not in codes:
        return f"two runs end with {sorted(codes)}"
    left = state(out)
    off = [name for name in whole.made if name not in command.varies and left.get(name) != whole.made[name]]
    more = sorted(left.keys() - whole.made.keys())
    return f"two runs make {off[:3]}, leave {more[:3]}" if off or more else None


def _age(whole: Whole, out: Path) -> None:
    """The outputs of an older run: other bytes, but in a folder the same record of what is moequant's."""
    for name, content in whole.made.items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(content if Path(name).name == RECORD else b"old " + content[:100])


def _half_written(command: Command, whole: Whole, old: State, now: State) -> str | None:
    """An output, or a file of a folder, that is neither as it was nor as it should be."""
    for name in whole.made:
        told = now.get(name)
        if told == old.get(name) or told == whole.made[name]:
            continue
        if told is not None and name in command.varies and told.rstrip()[-1:] in b"}>":
            continue
        if told is None and name == command.first:
            continue
        return f"{name} is {'gone' if told is None else 'neither old nor new'}"
    versions = {now.get(name) == old.get(name) for name in whole.made if name.startswith("f/")
                and old.get(name) != whole.made[name]}  # fmt: skip
    return "a folder of old and new files" if len(versions) > 1 else None


def _names(out: Path) -> set[str]:
    return {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_dir()}


def _parents(made: State) -> set[str]:
    parents = (parent.as_posix() for name in made for parent in Path(name).parents)
    return {parent for parent in parents if parent != "."}


def main(kills: int, seed: int, only: str | None, work: Path) -> int:
    """Kill so many times, commands in turn; print and count what is wrong."""
    ground = make(work)
    todo = [one for one in commands(ground) if only is None or one.name in only.split(",")]
    temporary = work / "tmp"
    temporary.mkdir()
    tempfile.tempdir = str(temporary)
    wholes = [run_whole(command, work / f"whole-{number}") for number, command in enumerate(todo)]
    shutil.rmtree(temporary)
    temporary.mkdir()
    print(
        ", ".join(f"{c.name} {w.seconds:.1f} s {w.steps}" for c, w in zip(todo, wholes, strict=True)),
        flush=True,
    )
    wrong = 0
    for number in range(kills):
        command, whole = todo[number % len(todo)], wholes[number % len(todo)]
        out = work / f"kill-{number}"
        random = Random(f"{seed}/{number}")
        found = (race if number % 10 == 9 else strike)(random, command, whole, out)
        if found:
            wrong += 1
            print(f"{number} {command.name}: {found}", flush=True)
        else:
            shutil.rmtree(out)
        if number % 20 == 19:
            print(f"{number + 1} kills, {wrong} wrong", flush=True)
    print(f"{wrong} of {kills} kills went wrong")
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="tests.hostile.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=334, help="a tenth of them are races")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", help="names of commands, by commas")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as made:
        sys.exit(main(asked.kills, asked.seed, asked.only, Path(made).resolve()) > 0)
