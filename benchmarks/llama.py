"""llama.cpp beside us: logits of files in its runtime, its tools' files, and what they reached on `mix`."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from torch import Tensor
from tqdm import tqdm

from benchmarks.data import Beside
from benchmarks.harness import Row
from moequant import Settings, convert
from moequant.checkpoint import open_checkpoint
from moequant.containers.gguf.export import Exported, export
from moequant.containers.gguf.presets import facts, llama_cpp_types
from moequant.containers.gguf.sizes import parse_size
from moequant.evaluate import Comparison, Scores, score_tokens, summarize
from moequant.evaluate.divergence import join
from moequant.runtimes.llama_cpp.engine import Llama
from moequant.text.rows import ROW


def logits(path: Path, ids: Tensor) -> list[Tensor]:
    """Logits f32 of the second half of every row of `ids` [rows, n], as llama-perplexity scores it."""
    half = ids.shape[1] // 2
    with Llama(path, n_ctx=ids.shape[1], threads=1) as model:
        return [
            torch.from_numpy(model.logits(row.tolist()))[half:].clone() for row in tqdm(ids, disable=None)
        ]


@dataclass(frozen=True)
class Judge:
    """The F32 file's logits on the evaluation rows, and what other files are scored against."""

    ids: Tensor
    base: list[Tensor]

    @classmethod
    def of(cls, exact: Path, ids: Tensor) -> Judge:
        """The judge of one F32 file."""
        return cls(ids, logits(exact, ids))

    def scores(self, path: Path) -> Scores:
        """Every scored token of a file in llama.cpp."""
        half = self.ids.shape[1] // 2
        found = zip(self.base, logits(path, self.ids), self.ids, strict=True)
        return join([score_tokens(p[:-1], q[:-1], row[half + 1 :]) for p, q, row in found])

    def comparison(self, path: Path) -> Comparison:
        """The same, summed up."""
        return summarize(self.scores(path), path.name)


def exact_file(model: Path, folder: Path) -> Path:
    """The F32 file of a model, made when it is not in `folder`."""
    path = folder / "F32.gguf"
    if not path.exists():
        convert(model, path, Settings("F32", eval_tokens=0))
    return path


def types_of(path: Path) -> dict[str, str]:
    """Tensor, by the file's name → its type in a GGUF file: a plan."""
    return {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(path).tensors}


def as_file(model: Path) -> Exported:
    """A model cut into the tensors that a GGUF file has: what presets name the types of."""
    return export(open_checkpoint(model))


def preset_types(exported: Exported, preset: str) -> dict[str, str]:
    """llama.cpp's own types of a preset, by its rules; they equal those of its recorded files."""
    return dict(llama_cpp_types(preset, exported.weights, facts(exported)))


def plan_of(model: Path, preset: str, path: Path) -> Path:
    """The same written as a plan."""
    path.write_text(json.dumps(preset_types(as_file(model), preset)))
    return path


Figures = Mapping[str, float]
"""What llama.cpp's tools reached with one file, in the words of shared/baselines."""


@dataclass(frozen=True)
class Baselines:
    """llama.cpp's figures on a model; none where no file has them."""

    results: tuple[dict[str, Any], ...]

    @classmethod
    def of(cls, options: Beside) -> Baselines:
        """Those that the options name."""
        file = options.baselines
        return cls(tuple(json.loads(file.read_text())["results"]) if file else ())

    def type(self, name: str) -> Figures | None:
        """The figures of its file of a type."""
        return next((each for each in self.results if each["type"] == name), None)

    def best(self, size: str) -> Figures | None:
        """Those of its best file that is no larger."""
        fitting = [each for each in self.results if each["bytes"] <= parse_size(size)]
        return min(fitting, key=lambda each: each["kld_mean"], default=None)


def as_figures(found: Comparison) -> Figures:
    """A comparison in llama.cpp's words."""
    return {
        "ppl": found.perplexity.value,
        "kld_mean": found.kl_mean.value,
        "kld_99": found.kl_99,
        "same_top_percent": 100 * found.same_top,
    }


def beside(found: Comparison, its: Figures | None) -> Row:
    """The columns of our file beside llama.cpp's; "its" are empty where no figures are known."""
    ours, its = as_figures(found), its or {}
    row: Row = {"mean KL": ours["kld_mean"], "±": found.kl_mean.error, "its KL": its.get("kld_mean")}
    row["ratio"] = ours["kld_mean"] / its["kld_mean"] if its else None
    for name, key in (
        ("KL 99 %", "kld_99"),
        ("same top, %", "same_top_percent"),
        ("perplexity", "ppl"),
    ):
        row |= {name: ours[key], f"its {name}": its.get(key)}
    return row


@dataclass(frozen=True)
class Tools:
    """llama.cpp's own files of one model, made by its tools when first asked for. `exact` is ours, in F32."""

    exact: Path
    folder: Path

    def imatrix(self, text: Path, chunks: int) -> Path:
        """llama-imatrix's file of the first `chunks` of `text`."""
        path = self.folder / f"imatrix-{chunks}.gguf"
        options = ["-f", text, "-c", ROW, "--chunks", chunks, "-t", 1, "--no-ppl"]
        return _made(path, lambda out: ["llama-imatrix", "-m", self.exact, *options, "-o", out])

    def quantized(self, kind: str, imatrix: Path) -> Path:
        """llama-quantize's file of a type under an imatrix; `TYPE:layers` leaves the ends in F32."""
        path, (name, _, part) = self.folder / f"{kind}-{imatrix.name}", kind.partition(":")
        kept = ["--token-embedding-type", "f32", "--output-tensor-type", "f32"] if part else []
        tool = ["llama-quantize", *kept, "--imatrix", imatrix, self.exact]
        return _made(path, lambda out: [*tool, out, name, 1])


def _made(path: Path, command: Callable[[Path], list[Any]]) -> Path:
    if path.exists():
        return path
    partial = path.with_name(f"partial-{path.name}")
    subprocess.run([str(word) for word in command(partial)], check=True, capture_output=True)
    return partial.rename(path)
