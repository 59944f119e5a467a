"""What is no regular file where one was expected: pipes, devices, sockets, folders, links."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from random import Random

from tests.hostile.attempts import QUICK, Attempt, on_model
from tests.hostile.ground import Ground

Place = Callable[[Path, Ground], None]


def _socket(path: Path, ground: Ground) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


PLACES: dict[str, Place] = {
    "fifo": lambda path, ground: os.mkfifo(path),
    "zeros": lambda path, ground: path.symlink_to("/dev/zero"),
    "random": lambda path, ground: path.symlink_to("/dev/urandom"),
    "null": lambda path, ground: path.symlink_to("/dev/null"),
    "terminal": lambda path, ground: path.symlink_to("/dev/tty"),
    "folder": lambda path, ground: path.mkdir(),
    "dangling": lambda path, ground: path.symlink_to(path.with_name("nothing")),
    "loop": lambda path, ground: path.symlink_to(path),
    "socket": _socket,
    "bait": lambda path, ground: path.symlink_to(ground.bait / "secret.txt"),
    "bait's model": lambda path, ground: path.symlink_to(ground.bait / "model.safetensors"),
    "bait's folder": lambda path, ground: path.symlink_to(ground.bait),
    "memory": lambda path, ground: path.symlink_to("/proc/self/mem"),
}


def special(random: Random, ground: Ground, folder: Path) -> Attempt:
    """An input, a side file or an output that is something special."""
    what = random.choice(sorted(PLACES))
    draw = random.random()
    if draw < 0.5:
        return _in_model(random, ground, folder, what)
    if draw < 0.75:
        return _beside(random, ground, folder, what)
    return _output(random, ground, folder, what)


def _in_model(random: Random, ground: Ground, folder: Path, what: str) -> Attempt:
    family = random.choice(["qwen3_moe", "mixtral"])
    model = ground.copy(family, folder / "model")
    name = random.choice(
        ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", "chat_template.jinja",
         "generation_config.json", "special_tokens_map.json", "model.safetensors.index.json", "LICENSE",
         "more.safetensors", "hf_quant_config.json", "tokenizer.model", "chat_template.json", "notes.txt"]
    )  # fmt: skip
    if name == "tokenizer.model":
        (model / "tokenizer.json").unlink()
    (model / name).unlink(missing_ok=True)
    PLACES[what](model / name, ground)
    if random.random() < 0.3:
        out = str(folder / "out" / "folder")
        use = ["convert", str(model), "-o", out, "--format", "safetensors", "--group-size", "32", *QUICK,
               "--stats", str(ground.files["stats"])]  # fmt: skip
        return Attempt(use, f"{name} is {what}")
    return on_model(random, model, f"{name} is {what}")


def _beside(random: Random, ground: Ground, folder: Path, what: str) -> Attempt:
    path, model = folder / "file", str(ground.models["qwen3_moe"])
    PLACES[what](path, ground)
    out = ["-o", str(folder / "out" / "a.gguf"), *QUICK]
    use = random.choice(
        [
            ["convert", model, *out, "--type", "Q4_0", "--stats", str(path)],
            ["convert", model, *out, "--type", "Q4_0", "--imatrix", str(path)],
            ["convert", model, *out, "--plan", str(path), "--dry-run"],
            ["route", model, "--calib", str(path), "--calib-tokens", "1024"],
            ["route", model, "--merge", str(path)],
            ["inspect", str(path)],
            ["fit", str(path), "--vram", "1G", "--ram", "1G", "--ctx", "256"],
            ["check", str(path), "--sample", "1"],
            ["convert", str(path), *out, "--type", "F32"],
        ]
    )
    return Attempt(use, f"{use[0]} {what}")


def _output(random: Random, ground: Ground, folder: Path, what: str) -> Attempt:
    path, model, stats = folder / "out" / "a", str(ground.models["qwen3_moe"]), str(ground.files["stats"])
    PLACES[what](path, ground)
    own = ground.copy("qwen3_moe", folder / "model")
    shutil.copy(stats, folder / "stats.safetensors")
    overwrite = random.choice([[], ["--overwrite"]])
    quick = [*QUICK, "--stats", stats]
    use = random.choice(
        [
            ["convert", model, "-o", str(path), "--type", "Q4_0", *quick],
            ["convert", model, "-o", str(path), "--format", "safetensors", "--group-size", "32", *quick],
            ["route", model, "--merge", stats, "-o", str(path)],
            ["route", model, "--merge", stats, "--picture", f"{path}"],
            [
                "convert",
                model,
                "-o",
                str(path) + ".gguf",
                "--type",
                "Q4_0",
                *quick,
                "--imatrix-out",
                str(path),
            ],
            ["convert", model, "-o", f"{path}.gguf", "--type", "Q4_0", *quick, "--html", str(path)],
            ["convert", str(own), "-o", str(own / "model.safetensors"), "--type", "Q4_0", *quick],
            ["convert", str(own), "-o", str(own), "--format", "safetensors", "--group-size", "32", *quick],
        ]
    )
    asked = ground.bait if what == "bait's folder" else None  # a file goes into the folder that -o names
    return Attempt([*use, *overwrite], f"output {what} {overwrite}", within=asked)
