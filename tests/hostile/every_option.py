"""Every option of every command, found in the commands themselves: odd numbers, words, files and places."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from tests.hostile.attempts import QUICK, Attempt
from tests.hostile.ground import Ground
from tests.hostile.options import NAMES, NUMBERS, SIZES, WORDS
from tests.hostile.special import PLACES

SKIPPED = ("--help", "--speed")

ELSEWHERE = ("demo", "push")
"""Commands that are not called: one takes no model, the other talks to a server (tests/hub)."""

ROOMS = (0, 1, 100, 4096, 20_000, 100_000)
"""Bytes that a file may have before the disk is full."""


@cache
def _options() -> list[tuple[str, str, bool]]:
    """Command, option, and whether it takes a value."""
    from typer.main import get_command

    from moequant.cli import app

    root: Any = get_command(app)
    found = []
    for name, command in root.commands.items():
        for option in command.params:
            for spelled in (*option.opts, *option.secondary_opts):
                if spelled.startswith("--") and spelled not in SKIPPED and name not in ELSEWHERE:
                    found.append((name, spelled, not getattr(option, "is_flag", False)))
    return found


def _base(command: str, ground: Ground, out: Path) -> list[str]:
    """A quick call of each command."""
    model = str(ground.models["qwen3_moe"])
    stats, gguf, text = (str(ground.files[name]) for name in ("stats", "gguf", "text"))
    return {
        "convert": ["convert", model, "-o", str(out / "a.gguf"), *QUICK, "--stats", stats, "--type", "Q4_0"],
        "route": ["route", model, "--calib", text, "--calib-tokens", "256"],
        "plan": ["plan", model, "--bpw", "9", "--stats", stats, "--no-probes", "--effort", "fast"],
        "fit": ["fit", model, "--vram", "8G", "--ram", "8G", "--ctx", "256"],
        "inspect": ["inspect", model],
        "check": ["check", gguf, "--sample", "1", "--device", "cpu"],
        "compare": ["compare", model, gguf, "--eval", text, "--eval-tokens", "1024"],
    }[command]


def every_option(random: Random, ground: Ground, folder: Path) -> Attempt:
    """A quick call, and one or two options more, with values that may be anything."""
    out = folder / "out"
    chosen = [random.choice(_options())]
    command = chosen[0][0]
    base = _base(command, ground, out)
    others = [each for each in _options() if each[0] == command]
    if random.random() < 0.3:
        chosen.append(random.choice(others))
    more: list[str] = []
    for _, option, takes in chosen:
        more += [option, _value(random, ground, folder)] if takes else [option]
    return Attempt([*base, *more], f"{command} {' '.join(more)!r:.200}")


def _value(random: Random, ground: Ground, folder: Path) -> str:
    draw = random.random()
    if draw < 0.6:
        return random.choice([*NUMBERS, *SIZES, *WORDS, *map(str, (2**31, 2**63, 2**64, -(2**63), 10**30))])
    if draw < 0.75:
        name = random.choice(NAMES)
        return name if name.startswith("/") or not name else f"{folder / 'out'}/{name}"
    path = folder / "odd"
    if path.exists() or path.is_symlink():
        return str(path)
    if draw < 0.85:
        PLACES[random.choice(sorted(PLACES))](path, ground)
    else:
        path.write_bytes(random.choice([b"", b"{}", b"null", b"[]", b"GGUF", b"\0" * 100, b"text\n" * 1000]))
    return str(path)


def rooms(random: Random, ground: Ground, folder: Path) -> Attempt:
    """A disk that is full before an output is complete."""
    out, model, stats = folder / "out", str(ground.models["qwen3_moe"]), str(ground.files["stats"])
    use = random.choice(
        [
            ["convert", model, "-o", str(out / "a.gguf"), "--type", "Q4_0", *QUICK, "--stats", stats],
            ["convert", model, "-o", str(out / "a.gguf"), "--type", "F32", *QUICK],
            ["convert", model, "-o", str(out / "f"), "--format", "safetensors", "--group-size", "32", *QUICK,
             "--stats", stats],
            ["route", model, "--merge", stats, *random.choice([["-o", str(out / "s.safetensors")],
                                                               ["--imatrix-out", str(out / "i.gguf")]])],
            ["route", model, "--calib", str(ground.files["text"]), "--calib-tokens", "1024", "-o",
             str(out / "s.safetensors")],
            ["route", model, "--merge", stats, "--picture", str(out / "p.png")],
            ["plan", model, "--bpw", "9", "--stats", stats, "--no-probes", "--effort", "fast",
             *random.choice([["-o", str(out / "p.json")], ["--curve", str(out / "c.png")]])],
            ["check", str(ground.files["gguf"]), "--sample", "1", "--device", "cpu", "--json"],
            ["compare", model, str(ground.files["gguf"]), "--eval", str(ground.files["text"]),
             "--eval-tokens", "1024", "--html", str(out / "c.html")],
        ]
    )  # fmt: skip
    room = random.choice(ROOMS)
    return Attempt(use, f"{use[0]} with room for {room} bytes a file", room=room)


def takeovers(random: Random, ground: Ground, folder: Path) -> Attempt:
    """Outputs in, over or around what is read, and --overwrite of folders that are somebody else's."""
    own = ground.copy("qwen3_moe", folder / "model")
    theirs = folder / "out" / "theirs"
    (theirs / "sub").mkdir(parents=True)
    (theirs / "thesis.tex").write_text("mine")
    (theirs / "sub" / "notes").symlink_to(ground.bait / "secret.txt")
    record = random.choice(
        [
            None,
            {},
            {"made_by": "moequant 0.1.0", "files": [f"../../../{ground.bait.name}/secret.txt", "sub/notes"]},
            {"made_by": "moequant 0.1.0", "files": [str(ground.bait / "secret.txt"), ".", "..", "", "sub"]},
            {"made_by": "moequant 0.1.0", "files": "thesis.tex"},
            {"made_by": "moequant 0.1.0", "files": [None, 3]},
            {"made_by": ["moequant 0.1.0"], "files": []},
            [1],
        ]
    )
    if record is not None:
        (theirs / "moequant.json").write_text(json.dumps(record))
    if random.random() < 0.3:
        shutil.rmtree(theirs)
        theirs.symlink_to(random.choice([ground.bait / "secret.txt", own, folder, folder / "nowhere"]))
    path = random.choice([own, own / "out", own.parent, own / "config.json", own / "tokenizer.json", theirs,
                          theirs / "sub", theirs / "sub" / "notes", own / "..", Path("/"), Path("/tmp"),
                          Path("/proc/self/cwd")])  # fmt: skip
    quick = [*QUICK, "--stats", str(ground.files["stats"])]
    use = random.choice(
        [
            ["convert", str(own), "-o", str(path), "--format", "safetensors", "--group-size", "32", *quick],
            ["convert", str(own), "-o", str(path), "--type", "Q4_0", *quick],
            ["convert", str(own), "-o", str(own / "q.gguf"), "--type", "Q4_0", *quick, "--imatrix-out",
             str(path)],
            ["route", str(own), "--merge", str(ground.files["stats"]), "-o", str(path)],
        ]
    )  # fmt: skip
    return Attempt([*use, *random.choice([[], ["--overwrite"]])], f"{use[0]} onto {path.name}, {record}")
