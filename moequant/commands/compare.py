"""Comparing on its own: open baseline and candidates, draw the text, score them all on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Literal

import torch

from moequant.checkpoint import Checkpoint
from moequant.commands.text import leading
from moequant.containers.opened import open_model
from moequant.errors import PlanError
from moequant.escape import of_cache, text_names
from moequant.evaluate import Measured, Ran, difference, runtime, samples
from moequant.evaluate import environment as record
from moequant.evaluate.activations import Rounded
from moequant.evaluate.compared import Compared
from moequant.evaluate.open_source import Source, model_of, open_files, open_source
from moequant.evaluate.side_by_side import Version, compare
from moequant.forward.resources import Resources
from moequant.hub import Model, named
from moequant.hub.fetch import headers, whole
from moequant.progress import Meter
from moequant.runtimes.llama_cpp.serving import Prompt, serve, trained_context
from moequant.runtimes.llama_cpp.session import PIECE
from moequant.text import bundled, corpus
from moequant.text.corpus import Rows
from moequant.text.rows import ROW, load_encoder, row_length

Engine = Literal["moequant", "llama.cpp"]
CacheType = Literal["f32", "f16", "q8_0"]

SHORTEST = 16
"""Tokens in a row at least: the few that are scored must have a standard error."""

SAMPLE_TOKENS = 32
"""Tokens that a prompt is continued by, unless somebody says otherwise."""


@dataclass(frozen=True, slots=True)
class CompareSettings:
    """On which text to compare, and what computes the models.

    `eval` is a file, a folder, a .jsonl file or a dataset; None is the bundled text. It is cut into rows of
    `ctx` tokens, of which the second half is scored; None means 512, or all of a shorter context. `engine`
    computes the models: moequant itself, or llama.cpp, which takes GGUF files only. `model` is the
    unquantized folder, needed when it is not among the compared models. llama.cpp and vLLM round activations
    before quantized weights, and so does moequant, unless `exact` is set. With llama.cpp `cache_type` is how
    candidates keep keys and values, where they are scored and where they continue prompts; the baseline then
    keeps f32. None scores all of them with f32, and lets llama.cpp choose for prompts (f16).

    Every model continues the bundled prompts and those of `prompts` by `sample_tokens` tokens; 0 for none.
    None means 32 with llama.cpp or with `prompts`, else none. `command` is the command line, for the record.
    """

    eval: str | Path | None = None
    eval_tokens: int = 16_384
    ctx: int | None = None
    seed: int = 0
    engine: Engine = "moequant"
    cache_type: CacheType | None = None
    model: Model | None = None
    exact: bool = False
    prompts: tuple[str, ...] = ()
    sample_tokens: int | None = None
    command: str | None = None
    resources: Resources = field(default_factory=Resources)

    @property
    def tokens_sampled(self) -> int:
        """`sample_tokens`, or what None stands for."""
        if self.sample_tokens is not None:
            return self.sample_tokens
        return SAMPLE_TOKENS if self.prompts or self.engine == "llama.cpp" else 0

    @property
    def threads(self) -> int:
        """Threads that compute."""
        return self.resources.threads or torch.get_num_threads()


def run(
    base: Model,
    candidates: Sequence[Model],
    settings: CompareSettings = CompareSettings(),  # frozen
) -> Compared:
    """Score every candidate against `base`: folders, files and names of the Hub. A MoequantError with one
    clear line when something is wrong."""
    meter = Meter()
    if settings.engine == "moequant" and settings.cache_type not in (None, "f32"):
        raise PlanError(
            f"--cache-type {settings.cache_type}: only llama.cpp keeps keys and values so; add "
            "--engine llama.cpp, which takes GGUF files"
        )
    if settings.ctx is not None and settings.ctx < SHORTEST:
        raise PlanError(f"--ctx {settings.ctx}: rows of {SHORTEST} tokens or more were expected")
    with meter.stage("compare"):
        opened = _opened(whole(base), [whole(each) for each in candidates], settings)
        measured = _scored(opened, settings)
    pairs = combinations([(one.name, one.scores) for one in measured], 2)
    return Compared(
        base=opened.sources[0],
        candidates=opened.sources[1:],
        measured=measured,
        differences=tuple(difference(one, two) for one, two in pairs),
        engine=settings.engine,
        rounded=settings.engine == "moequant" and not settings.exact,
        tokens=opened.rows.ids.numel(),
        domains=tuple(dict.fromkeys(opened.rows.domains)),
        source=opened.rows.source,
        cost=meter.costs[0],
        ran=_ran(opened, settings) if settings.tokens_sampled else (),
        record=record.make(opened.sources, _settings(opened.rows, settings), settings.command),
    )


@dataclass(frozen=True, slots=True)
class _Opened:
    """Baseline and candidates, the text they are scored on, and how the model computes where we compute."""

    sources: tuple[Source, ...]
    rows: Rows
    checkpoint: Checkpoint | None


def _opened(base: Path, candidates: Sequence[Path], settings: CompareSettings) -> _Opened:
    paths = [base, *candidates]
    model = None if settings.model is None else headers(settings.model)
    if settings.engine == "moequant":
        checkpoint = model_of(paths, model)
        sources = tuple(open_source(path, checkpoint, settings.exact) for path in paths)
        return _Opened(sources, _rows(checkpoint, settings), checkpoint)
    sources = open_files(paths)
    if model is not None:
        return _Opened(sources, _rows(open_model(model), settings), None)
    # Without its folder the baseline's own tokenizer has to do.
    encoder = runtime.LlamaEncoder(base)
    documents = corpus.read(settings.eval, "evaluation")
    trained = trained_context(base)
    length = _length(settings, min(ROW, trained or ROW))
    rows = corpus.pack(documents, encoder, length, settings.eval_tokens, settings.seed, encoder.bos)
    return _Opened(sources, corpus.check(rows, max_length=trained), None)


def _scored(opened: _Opened, settings: CompareSettings) -> tuple[Measured, ...]:
    """Every candidate against the baseline, by the engine that was asked for."""
    names, checkpoint = _names(opened.sources), opened.checkpoint
    if checkpoint is None:
        paths = [source.path for source in opened.sources]
        candidates = list(zip(names[1:], paths[1:], strict=True))
        return runtime.compare(
            paths[0], candidates, opened.rows, settings.threads, settings.cache_type or "f32"
        )
    versions = [
        Version(name, source.provider, _rounded(checkpoint, source, settings))
        for name, source in zip(names, opened.sources, strict=True)
        if source.provider is not None
    ]
    return compare(checkpoint, versions[0], versions[1:], opened.rows, settings.resources)


def _rounded(checkpoint: Checkpoint, source: Source, settings: CompareSettings) -> Rounded | None:
    return None if settings.exact else rounded_by_runtime(checkpoint, source)


def rounded_by_runtime(checkpoint: Checkpoint, source: Source) -> Rounded | None:
    """What llama.cpp or vLLM does to the inputs of this version's products, None where nothing."""
    if source.inputs is not None:
        rounds = any(told.numbers for told in source.inputs.values())
        return Rounded(checkpoint, source.inputs) if rounds else None
    return Rounded(checkpoint, source.types) if source.kind == "GGUF" else None


def _names(sources: Sequence[Source]) -> list[str]:
    """The last parts of the paths, as many as tell the sources apart; numbered names where none do. Sources
    of the Hub are called as there."""
    cached = [of_cache(source.path) is not None for source in sources]
    parts = [
        (source.name,) if known else source.path.absolute().parts
        for source, known in zip(sources, cached, strict=True)
    ]
    for count in (1, 2, 3):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{source.name} ({number})" for number, source in enumerate(sources)]


def _ran(opened: _Opened, settings: CompareSettings) -> tuple[Ran, ...]:
    """What every version makes of the prompts: GGUF files in llama.cpp, folders in transformers."""
    names = (
        ["user"] if len(settings.prompts) == 1 else [f"user {n + 1}" for n in range(len(settings.prompts))]
    )
    texts = [*bundled.prompts().items(), *zip(names, settings.prompts, strict=True)]
    prompts, tokens = [Prompt(name, text) for name, text in texts], settings.tokens_sampled
    found = []
    for name, source in zip(_names(opened.sources), opened.sources, strict=True):
        if source.kind == "GGUF":
            baseline = source is opened.sources[0]
            cache = "f32" if baseline and settings.cache_type else settings.cache_type
            serving = serve(source.path, prompts, tokens, settings.threads, cache)
            found.append(Ran(name, serving.samples, serving))
            continue
        assert opened.checkpoint is not None and source.provider is not None
        fits = samples.fits(opened.checkpoint)
        made = samples.sample(opened.checkpoint, source.provider, prompts, tokens) if fits else ()
        found.append(Ran(name, made))
    return tuple(found)


def _settings(rows: Rows, settings: CompareSettings) -> dict[str, record.Setting]:
    """What decides the figures besides files, versions and machine."""
    ours = settings.engine == "moequant"
    found: dict[str, record.Setting] = {
        "engine": settings.engine,
        "activations": "rounded as the runtime does" if ours and not settings.exact else "the engine's own",
        "text": text_names(rows.source),
        "tokens": rows.ids.numel(),
        "tokens SHA-256": record.digest(rows.ids),
        "context": rows.ids.shape[1],
        "batch": settings.resources.batch_tokens if ours else PIECE,
        "threads": settings.resources.workers if ours else settings.threads,
        "device": settings.resources.device,
        "seed": settings.seed,
    }
    if not ours:
        found["keys and values"] = f"{settings.cache_type or 'f32'}, the baseline's f32"
    if settings.model is not None:
        found["model"] = named(settings.model)
    if settings.tokens_sampled:
        prompts = bundled.prompts()
        found |= {
            "prompts": ", ".join([*prompts, *settings.prompts]),
            "prompts SHA-256": record.text_digest([*prompts.values(), *settings.prompts]),
            "sampled": f"{settings.tokens_sampled} tokens a prompt, greedy",
        }
    return found


def _rows(checkpoint: Checkpoint, settings: CompareSettings) -> Rows:
    bos = leading(checkpoint)
    documents = corpus.read(settings.eval, "evaluation")
    encoder = load_encoder(checkpoint.path)
    length = _length(settings, row_length(checkpoint))
    rows = corpus.pack(documents, encoder, length, settings.eval_tokens, settings.seed, bos)
    return corpus.check(rows, max_length=checkpoint.shape.context, vocab_size=checkpoint.shape.vocab)


def _length(settings: CompareSettings, usual: int) -> int:
    """Tokens in a row, `usual` unless somebody says otherwise. CorpusError for more than the text gives."""
    length = settings.ctx or usual
    shorter = "--ctx" if settings.ctx is not None and settings.ctx > usual else ""
    corpus.check_budget(settings.eval_tokens, length, corpus.EVALUATING, shorter)
    return length
