"""GGUF files made by hand: every field of the header may say anything."""

from __future__ import annotations

import struct
from pathlib import Path
from random import Random

from tests.hostile.attempts import QUICK, Attempt
from tests.hostile.ground import Ground

SIZES = (0, 1, 3, 32, 2**31, 2**32, 2**40, 2**60, 2**63, 2**64 - 1)
STRING, ARRAY = 8, 9

NAMES = (
    b"general.architecture", b"general.alignment", b"general.type", b"general.name", b"split.count",
    b"split.no", b"tokenizer.ggml.tokens", b"tokenizer.chat_template", b"qwen3moe.block_count",
    b"qwen3moe.expert_count", b"qwen3moe.context_length", b"moequant.crc32",
    b"moequant.version", b"imatrix.datasets", b"imatrix.chunk_count", b"", b"a\0b", b"\xff\xfe",
    b"\x1b[31m.\n", b"x" * 70_000,
)  # fmt: skip
"""Names of keys: known ones, and those that are no names."""


def crafted(random: Random, ground: Ground, folder: Path) -> Attempt:
    """A header of random parts, most of them right, some not."""
    path = folder / random.choice(["model.gguf", "model-00001-of-00002.gguf", "x-00001-of-99999.gguf"])
    keys = [_string(b"general.architecture") + struct.pack("<I", STRING) + _string(b"qwen3moe")]
    keys += [_key(random) for _ in range(random.randrange(6))]
    tensors = [_tensor(random, number) for number in range(random.randrange(4))]
    counts = [len(tensors), len(keys)]
    if random.random() < 0.2:
        counts[random.randrange(2)] = random.choice(SIZES)
    version = random.choice([3, 3, 3, 3, 2, 1, 0, 4, 3 << 24])
    header = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(keys) + b"".join(tensors)
    path.write_bytes(header + b"\0" * random.choice([0, 7, 32, 4096, 100_000]))
    model = str(ground.models["qwen3_moe"])
    use = random.choice(
        [
            ["inspect", str(path)],
            ["inspect", str(path), "--json"],
            ["fit", str(path), "--vram", "8G", "--ram", "8G", "--ctx", "256"],
            ["check", str(path), "--sample", "2", "--device", "cpu"],
            ["convert", model, "-o", str(folder / "out" / "a.gguf"), *QUICK, "--type", "Q4_0", "--imatrix",
             str(path)],
            ["compare", model, str(path), "--eval", str(ground.files["text"]), "--eval-tokens", "1024"],
            ["compare", str(ground.files["gguf"]), str(path), "--engine", "moequant", "--model", model,
             "--eval", str(ground.files["text"]), "--eval-tokens", "1024"],
        ]
    )  # fmt: skip
    return Attempt(use, f"{use[0]} of a GGUF made by hand", use[0] in ("convert", "compare"))


def _string(content: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(content) if length is None else length) + content


def _key(random: Random) -> bytes:
    name = random.choice(NAMES)
    kind = random.choice([*range(13), ARRAY, ARRAY, 13, 255, 2**32 - 1])
    length = random.choice(SIZES) if random.random() < 0.05 else None
    return _string(name, length) + struct.pack("<I", kind) + _value(random, kind, 0)


def _value(random: Random, kind: int, depth: int) -> bytes:
    if kind == STRING:
        return _string(random.choice([b"", b"text", b"\xff", b"\x1b]0;x\x07\n", b"y" * 100_000, b"imatrix"]),
                       random.choice(SIZES) if random.random() < 0.1 else None)  # fmt: skip
    if kind == ARRAY:
        if random.random() < 0.15:  # arrays in arrays in arrays
            deep = random.choice([2, 50, 3000])
            return (struct.pack("<IQ", ARRAY, 1)) * deep + struct.pack("<IQ", 4, 0)
        inner = random.choice([*range(13), ARRAY, 99]) if depth < 3 else 4
        count = random.choice([0, 1, 5, random.choice(SIZES)])
        body = b"".join(_value(random, inner, depth + 1) for _ in range(min(count, 5)))
        return struct.pack("<IQ", inner, count) + body
    size = {0: 1, 1: 1, 2: 2, 3: 2, 7: 1, 10: 8, 11: 8, 12: 8}.get(kind, 4)
    return random.choice([b"\0" * size, b"\xff" * size, b"\x01" + b"\0" * (size - 1), random.randbytes(size)])


def _tensor(random: Random, number: int) -> bytes:
    name = random.choice(
        [b"blk.%d.ffn_up_exps.weight" % number, b"token_embd.weight", b"", b"\n", b"z" * 300]
    )
    dims = [random.choice([32, 64, 256, *SIZES]) for _ in range(random.choice([1, 2, 2, 3, 0, 4, 5, 200]))]
    count = len(dims) if random.random() < 0.9 else random.choice([0, 2**32 - 1, 7])
    kind = random.choice([0, 1, 2, 8, 12, 30, 39, 4, 5, 255, 2**31])
    offset = random.choice([0, 32, 64, 1, 2**63, 2**64 - 32, 4096])
    shape = struct.pack(f"<{len(dims)}Q", *dims)
    return _string(name) + struct.pack("<I", count) + shape + struct.pack("<IQ", kind, offset)
