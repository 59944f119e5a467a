"""Runs attempts in forked children, and says what is wrong with how they ended."""

from __future__ import annotations

import json
import os
import resource
import select
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import IO, Any

from moequant.commands.journal import GOES_ON
from tests.hostile import crafted, every_option, files, folders, options, quantized, special
from tests.hostile.attempts import Attempt, Maker
from tests.hostile.ground import MARK, Ground
from tests.peak import watched

KINDS: dict[str, Maker] = {
    "headers": folders.headers,
    "indexes": folders.indexes,
    "configs": folders.configs,
    "tokenizers": folders.tokenizers,
    "statistics": files.statistics,
    "imatrices": files.imatrices,
    "plans": files.plans,
    "ggufs": files.ggufs,
    "texts": files.texts,
    "options": options.options,
    "special": special.special,
    "quantized": quantized.quantized,
    "families": folders.families,
    "crafted": crafted.crafted,
    "every option": every_option.every_option,
    "rooms": every_option.rooms,
    "takeovers": every_option.takeovers,
}

SHARES = {"configs": 2, "tokenizers": 2, "special": 2, "quantized": 2, "every option": 2}
"""How many more of some kinds are tried than of others."""

HANG = 30
"""Seconds of its own processor time that an attempt may take."""

ASLEEP = 300
"""Seconds of the clock: what waits for a pipe takes no processor time, nor does what a busy machine keeps
waiting."""

LINE = len("moequant: ") + 1000
"""Characters that a message may have."""

MEMORY = 2.0
"""Times the memory of a normal run that an attempt may take."""


ADDRESSES = 6 << 30
"""Bytes of address space that a child may have; most of it is libraries, and not memory."""


@dataclass(frozen=True, slots=True)
class Case:
    """An attempt that can be made again: its kind and number."""

    kind: str
    seed: int


@dataclass(frozen=True, slots=True)
class Broken:
    """An attempt that ended as none may."""

    case: Case
    what: str
    why: str
    arguments: list[str]


def cases(count: int, seed: int) -> list[Case]:
    """`count` cases, all kinds among them, the same ones for the same seed."""
    kinds = [kind for kind in KINDS for _ in range(SHARES.get(kind, 1))]
    return [Case(kinds[n % len(kinds)], seed * 1_000_000 + n) for n in range(count)]


def run(ground: Ground, todo: list[Case], work: Path, batch: int = 40) -> Iterator[Broken | None]:
    """Every case, in children that do a batch each; what broke, or None, case by case."""
    left = list(todo)
    while left:
        answered = 0
        for answer in _child(ground, left[:batch], work):
            answered += 1
            yield answer
        left = left[answered:]


def _child(ground: Ground, todo: list[Case], work: Path) -> Iterator[Broken | None]:
    """Answers of one child; when it hangs or dies, that is the answer to the case that it was at."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        status = 1
        try:
            os.setpgid(0, 0)
            with os.fdopen(writing, "w") as out:
                _work(ground, todo, work, out)
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    done, begun = 0, Attempt([], "?")
    with os.fdopen(reading, "rb", buffering=0) as answers:
        for line in _lines(answers, ASLEEP):
            found = json.loads(line)
            if isinstance(found, dict):
                begun = Attempt(**found)
                continue
            done += 1
            yield found and Broken(todo[done - 1], begun.what, found, begun.arguments)
    if done < len(todo):
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if done < len(todo):
        hung = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGKILL, signal.SIGPROF)
        why = "a hang" if hung else f"the process died with status {status}"
        yield Broken(todo[done], begun.what, why, begun.arguments)


def _lines(stream: IO[bytes], seconds: float) -> Iterator[bytes]:
    """Lines as they come, until the end or until none has come for so long."""
    kept, deadline = b"", time.monotonic() + seconds
    while select.select([stream], [], [], max(0.0, deadline - time.monotonic()))[0]:
        got = stream.read(65536)
        if not got:
            return
        kept += got
        *whole, kept = kept.split(b"\n")
        for line in whole:
            deadline = time.monotonic() + seconds
            yield line


def _work(ground: Ground, todo: list[Case], work: Path, out: IO[str]) -> None:
    """In the child: one case after another."""
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)
    os.dup2(os.open(work / "stderr.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))  # an error here, not the machine's end
    memory = watched()
    base = memory()
    for case in todo:
        signal.setitimer(signal.ITIMER_PROF, HANG)  # ends the process, whatever it is at
        folder = work / f"{case.kind}-{case.seed}"
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "out").mkdir(parents=True)
        attempt = KINDS[case.kind](Random(f"{case.kind}/{case.seed}"), ground, folder)
        out.write(json.dumps({"arguments": attempt.arguments, "what": attempt.what}) + "\n")
        out.flush()
        why = judge(ground, attempt, folder)
        peak = memory()
        if why is None and peak > MEMORY * base:
            why = f"{peak >> 20} MiB of memory, {base >> 20} before"
        if why is None:
            shutil.rmtree(folder, ignore_errors=True)
        out.write(json.dumps(why) + "\n")
        out.flush()


def judge(ground: Ground, attempt: Attempt, folder: Path) -> str | None:
    """Run one attempt in this process; why its end is wrong, None when it is right."""
    from typer.testing import CliRunner

    from moequant.cli import app

    outside, before = ground.bait_state(), _listed(folder)
    with _room(attempt.room):
        ran = CliRunner().invoke(app, attempt.arguments)
    if ran.exception is not None and not isinstance(ran.exception, SystemExit):
        return f"traceback: {where(ran.exc_info)}"
    if changed := _changed(ground, outside, attempt.within):
        return f"the bait was changed: {changed}"
    if ran.exit_code == 0:
        if attempt.refused:
            return "a wrong success"
        return _read_bait(folder / "out") or (
            _litter(before, folder) if "--dry-run" in attempt.arguments else None
        )
    told = [line for line in ran.stderr.splitlines() if line.startswith("moequant: ")]
    if ran.exit_code == 1 and attempt.arguments[:1] != ["check"] and len(told) != 1:
        return f"not one line: {ran.stderr[-300:]!r}"
    if ran.exit_code not in (1, 2):
        return f"exit code {ran.exit_code}"
    if long := next((line for line in told if len(line) > LINE), None):
        return f"a line of {len(long)} characters: {long[:200]}"
    if odd := next((one for line in told for one in line if one < " " or one == "\x7f"), None):
        return f"a control code {odd!r}"
    return _litter(before, folder, kept=any(GOES_ON in line for line in told))


def _changed(ground: Ground, before: Mapping[Path, str], within: Path | None) -> list[str]:
    """The bait's files that are others now; new ones under the folder `within` were asked for, and go."""
    after = ground.bait_state()
    new = {path for path in after if path not in before and within in path.parents}
    for path in (path for path in new if path.parent == within):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    names = {*before, *after} - new
    return sorted(path.name for path in names if before.get(path) != after.get(path))


@contextmanager
def _room(size: int | None) -> Iterator[None]:
    """No file of this process grows beyond so many bytes, as on a disk that is full then."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (before[0] if size is None else size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _listed(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def _litter(before: set[str], folder: Path, kept: bool = False) -> str | None:
    """What a run without a result has left, or taken away; a journal that is `kept` may stay."""
    after = {name for name in _listed(folder) if not kept or ".journal" not in name}
    more, less = sorted(after - before), sorted(before - after)
    return f"left {more[:5]}, took {less[:5]}" if more or less else None


def _read_bait(out: Path) -> str | None:
    for path in out.rglob("*"):
        if path.is_file() and not path.is_symlink() and MARK in path.read_bytes():
            return f"the bait is in {path.name}"
    return None


def where(info: Any) -> str:
    """The exception and the last places of ours that it passed."""
    kind, error, trace = info
    places = []
    while trace is not None:
        code = trace.tb_frame.f_code
        if "/moequant/" in code.co_filename:
            places.append(f"{code.co_filename.rpartition('/moequant/')[2]}:{trace.tb_lineno}")
        trace = trace.tb_next
    return f"{kind.__name__}: {str(error)[:200]} at {' < '.join(reversed(places[-4:]))}"


def main(count: int, seed: int, only: str | None, work: Path) -> int:
    """Make the ground, run the cases, print what broke; how many did."""
    from tests.hostile.ground import make

    begun = time.monotonic()
    ground = make(work)
    todo = [case for case in cases(count, seed) if only is None or case.kind in only.split(",")]
    print(f"{len(todo)} inputs, after {time.monotonic() - begun:.0f} s", flush=True)
    found = []
    for answer in run(ground, todo, work / "tries" if (work / "tries").mkdir() is None else work):
        if answer is not None:
            found.append(answer)
            print(f"{answer.case.kind} {answer.case.seed}: {answer.why}\n    {answer.what}", flush=True)
            print(f"    moequant {' '.join(answer.arguments)!r:.400}", flush=True)
    print(f"{len(found)} of {len(todo)} broke, {time.monotonic() - begun:.0f} s", file=sys.stderr)
    return len(found)
