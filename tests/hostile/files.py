"""Hostile files beside the model: statistics, imatrices, plans, GGUF files, texts."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from random import Random

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from moequant.statistics import sealed
from tests.hostile import damage
from tests.hostile.attempts import QUICK, Attempt
from tests.hostile.ground import Ground


def _convert(ground: Ground, folder: Path, *options: str) -> list[str]:
    out = str(folder / "out" / "a.gguf")
    return ["convert", str(ground.models["qwen3_moe"]), "-o", out, *QUICK, *options]


def statistics(random: Random, ground: Ground, folder: Path) -> Attempt:
    """Statistics whose checksum is right: an attacker can work it out as well."""
    path = folder / "stats.safetensors"
    use = _convert(ground, folder, "--type", "Q4_0", "--stats", str(path))
    if random.random() < 0.3:
        use = [
            "route",
            str(ground.models["qwen3_moe"]),
            "--merge",
            str(path),
            "--merge",
            str(ground.files["stats"]),
        ]
    if random.random() < 0.2:
        path.write_bytes(damage.any_damage(random, ground.files["stats"].read_bytes()))
        return Attempt(use, "bytes")
    with safe_open(ground.files["stats"], framework="pt") as file:
        meta = json.loads(file.metadata()[sealed.METADATA])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    name = random.choice(sorted(tensors))
    must = False
    if random.random() < 0.6:
        what, tensors[name], must = _odd_tensor(random, tensors[name])
        if tensors[name] is None or random.random() < 0.1:
            tensors[random.choice(["", "input", "input//", "route/x/tokens", "a/b/c/d"])] = torch.zeros(2)
            del tensors[name]
            what = "names"
        what = f"{name}: {what}"
    else:
        meta = damage.change(random, meta, random.randrange(1, 3))
        what = "header"
    meta.pop("crc32", None)
    meta["crc32"] = sealed.checksum(meta, tensors)
    save_file(tensors, path, {sealed.METADATA: json.dumps(meta, sort_keys=True)})
    return Attempt(use, what, must)


def _odd_tensor(random: Random, tensor: torch.Tensor) -> tuple[str, torch.Tensor, bool]:
    """What was done, the tensor, and whether nobody may believe it."""
    if random.random() < 0.5 and tensor.numel():
        bad = float(random.choice(["nan", "inf", "-inf", "-1"]))
        if not tensor.is_floating_point():
            bad = -1.0
        changed = tensor.clone()
        changed.view(-1)[random.randrange(changed.numel())] = bad
        return f"a value {bad}", changed, True
    return random.choice(
        [
            ("empty", tensor[:0].clone(), True),
            ("a row less", tensor[1:].clone(), True),
            ("flat", tensor.reshape(-1).clone(), tensor.dim() > 1),
            ("another type", tensor.to(torch.float16), False),
            ("bool", tensor.bool(), False),
            ("one number", torch.tensor(1.0), True),
            ("huge", torch.full_like(tensor, 1 << 62), False),
        ]
    )


def imatrices(random: Random, ground: Ground, folder: Path) -> Attempt:
    """An imatrix of llama.cpp, in both of its formats."""
    if random.random() < 0.6:
        path = folder / "imatrix.gguf"
        path.write_bytes(damage.any_damage(random, ground.files["imatrix"].read_bytes()))
    else:
        path = folder / "imatrix.dat"
        path.write_bytes(damage.any_damage(random, _dat(random)) if random.random() < 0.6 else _dat(random))
    return Attempt(_convert(ground, folder, "--type", "Q4_0", "--imatrix", str(path)), path.name)


def _dat(random: Random) -> bytes:
    """The older format: a count of entries; of each its name, chunks, and sums."""
    names = ["blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.0.ffn_down_exps.weight", "output.weight"]
    content = struct.pack("<i", random.choice([len(names), len(names), -1, 0, 2**31 - 1]))
    for name in names:
        sums = struct.pack("<64f", *[random.choice([1.0, 0.5, float("nan"), -1.0, 1e38])] * 64)
        size = random.choice([64, 64, 64, -1, 0, 2**31 - 1])
        content += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", 2, size) + sums
    return content + struct.pack("<i", 2) + struct.pack("<i", 4) + b"text"


def plans(random: Random, ground: Ground, folder: Path) -> Attempt:
    """The JSON document that people edit."""
    path = folder / "plan.json"
    document = json.loads(ground.files["plan"].read_text())
    raw = damage.text(random, document) if random.random() < 0.25 else None
    if raw is None:
        changed = damage.change(random, document, random.randrange(1, 4))
        if random.random() < 0.3:
            changed = {row["weight"]: damage.odd(random, row["format"]) for row in document["choices"]}
        raw = json.dumps(changed).encode()
    path.write_bytes(raw)
    quick = ["--dry-run"] if random.random() < 0.7 else ["--stats", str(ground.files["stats"])]
    return Attempt(_convert(ground, folder, "--plan", str(path), *quick), "plan")


def ggufs(random: Random, ground: Ground, folder: Path) -> Attempt:
    """A GGUF file, looked at in every way."""
    path = folder / "hostile.gguf"
    path.write_bytes(damage.any_damage(random, ground.files["gguf"].read_bytes()))
    return Attempt(
        random.choice(
            [
                ["inspect", str(path)],
                ["inspect", str(path), "--json"],
                ["fit", str(path), "--vram", "8G", "--ram", "8G", "--ctx", "256"],
                ["check", str(path), "--sample", "2", "--device", "cpu"],
            ]
        ),
        "gguf",
    )


def texts(random: Random, ground: Ground, folder: Path) -> Attempt:
    """Calibration texts: bytes, odd lines, odd names."""
    name = random.choice(
        ["text.txt", "text.jsonl", "[bold] $\\bad$.txt", "line\nbreak.txt", "\x1b[31m.jsonl"]
    )
    path = folder / name
    lines = [json.dumps(value).encode() for value in ({"text": damage.odd(random)}, damage.odd(random), {})]
    contents = [
        b"", b"\n\n\n", b"\0" * 5000, random.randbytes(2000), b"\xff\xfe" + "wide ".encode("utf-16-le") * 600,
        b"a" * 200_000, b"\n".join(lines * 20), ground.files["text"].read_bytes(),
    ]  # fmt: skip
    path.write_bytes(random.choice(contents))
    model, out = str(ground.models["qwen3_moe"]), folder / "out"
    use = ["route", model, "--calib", str(path), "--calib-tokens", "1024"]
    more = random.choice(
        [[], ["-o", str(out / "s.safetensors")], ["--picture", str(out / "p.svg")], ["--json"]]
    )
    return Attempt([*use, *more], f"{name!r}")
