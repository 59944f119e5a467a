"""Comparing on its own: open baseline and candidates, draw the text, score them all on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Literal

from moequant import corpus
from moequant.checkpoint import Checkpoint
from moequant.compare import Measured, difference, runtime
from moequant.compare.activations import Rounded
from moequant.compare.sources import Source, open_model, open_source
from moequant.compare.streaming import Version, compare
from moequant.containers.gguf_header import read_header
from moequant.containers.tokenizer import read_tokenizer
from moequant.corpus import Rows
from moequant.errors import CheckpointError
from moequant.meter import Meter
from moequant.report.compare import Compared
from moequant.routing.stream import Resources
from moequant.texts import ROW, load_encoder

Engine = Literal["moequant", "llama.cpp"]


@dataclass(frozen=True, slots=True)
class CompareSettings:
    """Which text, and who computes.

    `eval` as `corpus.read` takes it, None the bundled text. `model` is the unquantized folder
    when none is among what is compared. With `exact` the inputs of products are not rounded
    as llama.cpp rounds them before quantized weights.
    """

    eval: str | Path | None = None
    eval_tokens: int = 16_384
    seed: int = 0
    engine: Engine = "moequant"
    model: Path | None = None
    exact: bool = False
    resources: Resources = field(default_factory=Resources)


def run(
    base: Path,
    candidates: Sequence[Path],
    settings: CompareSettings = CompareSettings(),  # frozen
) -> Compared:
    """Score every candidate against `base`; a MoequantError with one clear line when something is wrong."""
    meter = Meter()
    with meter.stage("compare"):
        if settings.engine == "llama.cpp":
            sources, rows, measured = _with_llama(base, candidates, settings)
        else:
            sources, rows, measured = _streamed(base, candidates, settings)
    pairs = combinations([(one.name, one.scores) for one in measured], 2)
    return Compared(
        base=sources[0],
        candidates=sources[1:],
        measured=measured,
        differences=tuple(difference(one, two) for one, two in pairs),
        engine=settings.engine,
        rounded=settings.engine == "moequant" and not settings.exact,
        tokens=rows.ids.numel(),
        domains=tuple(dict.fromkeys(rows.domains)),
        source=rows.source,
        cost=meter.costs[0],
    )


def _streamed(
    base: Path, candidates: Sequence[Path], settings: CompareSettings
) -> tuple[tuple[Source, ...], Rows, tuple[Measured, ...]]:
    paths = [base, *candidates]
    checkpoint = open_model(paths, settings.model)
    sources = tuple(open_source(path, checkpoint) for path in paths)
    rows = _rows(checkpoint, settings)
    versions = [
        Version(name, source.provider, _rounded(checkpoint, source, settings))
        for name, source in zip(_names(sources), sources, strict=True)
        if source.provider is not None
    ]
    return sources, rows, compare(checkpoint, versions[0], versions[1:], rows, settings.resources)


def _rounded(checkpoint: Checkpoint, source: Source, settings: CompareSettings) -> Rounded | None:
    return Rounded(checkpoint, source.types) if source.kind == "GGUF" and not settings.exact else None


def _names(sources: Sequence[Source]) -> list[str]:
    """File names where they tell the sources apart, paths where they do not."""
    names = [source.name for source in sources]
    return [
        name if names.count(name) == 1 else str(source.path)
        for name, source in zip(names, sources, strict=True)
    ]


def _with_llama(
    base: Path, candidates: Sequence[Path], settings: CompareSettings
) -> tuple[tuple[Source, ...], Rows, tuple[Measured, ...]]:
    """GGUF files in llama.cpp, tokenized by the folder when there is one, else by the baseline itself."""
    sources = tuple(_file(path) for path in (base, *candidates))
    if settings.model is not None:
        rows = _rows(open_model([], settings.model), settings)
    else:
        encoder = runtime.LlamaEncoder(base)
        documents = corpus.read(settings.eval, "evaluation")
        rows = corpus.pack(documents, encoder, ROW, settings.eval_tokens, settings.seed, encoder.bos)
    measured = runtime.compare(base, list(zip(_names(sources)[1:], candidates, strict=True)), rows)
    return sources, rows, measured


def _file(path: Path) -> Source:
    """A GGUF file by its header; nobody here decodes it."""
    if path.is_dir():
        raise CheckpointError(f"{path}: llama.cpp runs GGUF files; convert it with --type BF16 or F32 first")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    header = read_header(path)
    types = {tensor.name: tensor.type for tensor in header.tensors}
    return Source(path, "GGUF", None, header.file_bytes, types)


def _rows(checkpoint: Checkpoint, settings: CompareSettings) -> Rows:
    tokenizer = read_tokenizer(checkpoint.path)
    bos = tokenizer.ids.get("bos") if tokenizer.add_bos else None
    documents = corpus.read(settings.eval, "evaluation")
    encoder = load_encoder(checkpoint.path)
    rows = corpus.pack(documents, encoder, ROW, settings.eval_tokens, settings.seed, bos)
    config = checkpoint.config
    return corpus.check(
        rows, max_length=int(config["max_position_embeddings"]), vocab_size=int(config["vocab_size"])
    )
