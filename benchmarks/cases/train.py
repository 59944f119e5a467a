"""Train a tiny model for other cases."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import measure
from benchmarks.data import CALIB, DEMO, MIX
from benchmarks.harness import Rows, case
from benchmarks.trained import MODELS
from moequant.text import corpus
from moequant.text.rows import load_encoder


@dataclass(frozen=True)
class Train:
    """`model` is one of benchmarks/trained.py; tokenizer and, where the model takes them, embeddings and
    head are those of `ends`. `folder` keeps it; without one it is only timed."""

    model: str = "olmoe"
    ends: Path = MIX
    text: Path | None = CALIB
    steps: int = 0
    folder: str = ""


@case("Train a tiny model of another family", Train("olmoe", DEMO, None, 1))
def train(o: Train) -> Rows:
    """The number of steps follows the clock unless it is given."""
    text = "".join(document.text for document in corpus.read(o.text))
    ids = torch.tensor(load_encoder(o.ends).encode(text, add_special_tokens=False).ids)
    recipe = MODELS[o.model].of(o.steps)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(o.folder or name) / o.model
        steps, seconds = measure.clock(lambda: recipe.train(o.ends, ids, folder))
        size = (folder / "model.safetensors").stat().st_size
    yield {"model": o.model, "steps": steps, "seconds": seconds, "bytes": size}
