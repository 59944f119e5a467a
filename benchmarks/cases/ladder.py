"""Presets beside llama.cpp's."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks import llama
from benchmarks.data import TINY, Beside
from benchmarks.harness import Rows, case
from moequant import Settings, convert
from moequant.containers.gguf.presets import BASE_TYPES
from moequant.formats import Effort


@dataclass(frozen=True)
class Ladder(Beside):
    """`types` are names of presets."""

    types: tuple[str, ...] = tuple(sorted(BASE_TYPES.keys() - {"F32", "BF16", "F16"}))
    effort: Effort = "default"


@case("Our presets beside llama.cpp's", Ladder(**TINY, types=("Q4_K_M",), effort="fast"), ("llama.cpp",))
def ladder(o: Ladder) -> Rows:
    """Type by type our file (sizes are exact), scored by llama.cpp itself against the F32 file, and what
    llama.cpp's own tools reached on the same text."""
    theirs = llama.Baselines.of(o)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        judge = llama.Judge.of(llama.exact_file(o.model, folder), o.ids)
        for type_ in o.types:
            path = folder / "ours.gguf"
            settings = Settings(type_, o.calib, o.tokens, eval_tokens=0, effort=o.effort, overwrite=True)
            made, its = convert(o.model, path, settings), theirs.type(type_)
            of_its = made.file_bytes / its["bytes"] if its else None
            size = {"type": type_, "bytes": made.file_bytes, "of llama.cpp's": of_its}
            yield size | llama.beside(judge.comparison(path), its)
