"""Hostile options: numbers, sizes, names, combinations."""

from __future__ import annotations

from pathlib import Path
from random import Random

from tests.hostile.attempts import QUICK, Attempt
from tests.hostile.ground import Ground

NUMBERS = (
    "0",
    "-1",
    "1",
    "nan",
    "inf",
    "-inf",
    "1e18",
    "1e308",
    "9" * 400,
    "1e-300",
    "",
    "x",
    "0x10",
    "٣",
    "1_0",
)

SIZES = (*NUMBERS, "14G", "1e9G", "9" * 400 + "G", "0.0000001K", "1KiBiB", "G", "-5M", "5 M", "99999999999T")

NAMES = (
    "a" * 231 + ".gguf", "a" * 5000, "\x1b[31m.gguf", "a\nb.gguf", "..", ".", "", "a/b/c.gguf", "é" * 120,
    "a\0b", "[/bold].gguf", "$\\bad$.gguf", "-x", "~", "\ud800.gguf", "/dev/null", "/dev/full",
    "/proc/self/mem", "/dev/stdout", "/nowhere/a.gguf",
)  # fmt: skip

WORDS = (
    "",
    "cuda",
    "cuda:99",
    "cpu:7",
    "mps",
    "meta",
    "gpu",
    "\x1b[31m",
    "Q4_K_M",
    "q4_k_m",
    "IQ1_S",
    "XX",
    "a" * 3000,
)


def options(random: Random, ground: Ground, folder: Path) -> Attempt:
    """One or two odd options of a command."""
    model, out, stats = str(ground.models["qwen3_moe"]), folder / "out", str(ground.files["stats"])
    base = ["convert", model, "-o", str(out / "a.gguf"), *QUICK, "--stats", stats, "--dry-run"]
    folders = ["convert", model, "-o", str(out / "f"), "--format", "safetensors", *QUICK, "--dry-run"]
    run = ["convert", model, "-o", str(out / "a.gguf"), *QUICK, "--stats", stats, "--type", "Q4_0"]
    number, size, word = random.choice(NUMBERS), random.choice(SIZES), random.choice(WORDS)
    name = _name(random.choice(NAMES), out)
    gone = "/nowhere/" + random.choice(NAMES).replace("\0", "")
    tried = random.choice(
        [
            [*base, "--bpw", number],
            [*base, "--size", size],
            [*base, "--type", word],
            [*base, "--type", "Q4_0", "--seed", number],
            [*base, "--type", "Q4_0", "--calib-tokens", number],
            [*base, "--type", "Q4_0", "--ram", size],
            [*base, "--type", "Q4_0", "--device", word],
            [*run, "--device", word],
            [*run, "--ram", size],
            [*run, "--seed", number, "--calib", str(ground.files["text"])],
            [*run[:2], "-o", name, *run[4:]],
            [*run, "--imatrix-out", name],
            [*folders, "--bits", number],
            [*folders, "--group-size", number],
            [*folders, "--tp", number],
            ["convert", gone, *base[2:]],
            [*base, "--plan", gone],
            ["convert", model, "-o", str(out / "a.gguf"), *QUICK, "--stats", gone, "--type", "Q4_0"],
            ["convert", model, "-o", str(out / "a.gguf"), *QUICK, "--imatrix", gone, "--type", "Q4_0"],
            ["convert", model, "-o", str(out / "a.gguf"), *QUICK, "--calib", gone, "--type", "Q4_0"],
            ["plan", model, "--size", size, "--stats", stats, "--no-probes", "--effort", "fast"],
            ["plan", model, "--sizes", f"{size},{random.choice(SIZES)}", "--stats", stats, "--no-probes"],
            ["plan", model, "--bpw", number, "--stats", stats, "--no-probes", "-o", name],
            ["fit", model, "--vram", size, "--ram", random.choice(SIZES), "--ctx", "256"],
            ["fit", model, "--vram", "8G", "--ram", "8G", "--ctx", number],
            ["fit", model, "--vram", "8G", "--ram", "8G", "--ctx", "256", "--parallel", number],
            ["fit", model, "--vram", "8G", "--ram", "8G", "--ctx", "256", "--vram-bandwidth", number],
            ["fit", model, "--vram", "8G", "--ram", "8G", "--ctx", "256", "--min-speed", number],
            ["fit", model, "--vram", "1G", "--ram", "1G", "--ctx", "256", "--disk-bandwidth", number],
            ["route", model, "--merge", stats, "--min-tokens-per-expert", number, "--max-tokens", "600"],
            ["route", model, "--calib", str(ground.files["text"]), "--calib-tokens", "1024",
             "--min-tokens-per-expert", number, "--max-tokens", "600"],
            ["route", model, "--merge", stats, "-o", name],
            ["route", model, "--merge", stats, "--picture", name],
            ["check", str(ground.files["gguf"]), "--sample", number, "--json"],
            ["compare", gone, str(ground.files["gguf"])],
            ["inspect", gone],
        ]
    )  # fmt: skip
    return Attempt(tried, "options")


def _name(name: str, out: Path) -> str:
    return name if name.startswith("/") or not name else f"{out}/{name}"
