"""Routing on its own: statistics of a model on some text, collected, merged, written down."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from moequant.checkpoint import Checkpoint, open_checkpoint
from moequant.commands.convert import check_memory
from moequant.containers.gguf import imatrix
from moequant.containers.gguf.tokenizer.spec import read_tokenizer
from moequant.errors import CorpusError, OutputError
from moequant.files import check_output
from moequant.forward.stream import Resources
from moequant.report.routing import check_picture, heatmap
from moequant.statistics import store
from moequant.statistics.calibrate import calibrate
from moequant.statistics.coverage import Coverage, cover
from moequant.statistics.journal import Journal, digest
from moequant.text import corpus
from moequant.text.corpus import Rows
from moequant.text.rows import ROW, load_encoder
from moequant.values import Calibration

Calibrate = Callable[[Checkpoint, Rows], Calibration]

BUDGET = 4
"""Feeding starved experts may take so many times the tokens of the first draw, unless told otherwise."""


@dataclass(frozen=True, slots=True)
class RouteSettings:
    """Which text, and what to add to it.

    `calib` as `corpus.read` takes it, None the bundled text. `ratio` > 0 draws more rows until
    every expert saw that multiple of its fair share of `calib_tokens`, at most `max_tokens` in all.
    The statistics in `merge` are added; with `calib` None nothing but those is then used.
    """

    calib: str | Path | None = None
    calib_tokens: int = 131_072
    seed: int = 0
    ratio: float = 0.0
    max_tokens: int | None = None
    merge: tuple[Path, ...] = ()
    resources: Resources = field(default_factory=Resources)


@dataclass(frozen=True, slots=True)
class Outputs:
    """Files to write, None for those not wanted."""

    stats: Path | None = None
    imatrix: Path | None = None
    picture: Path | None = None
    overwrite: bool = False


@dataclass(frozen=True, slots=True)
class Routed:
    """The statistics, and what coverage did when it was asked for."""

    checkpoint: Checkpoint
    stored: store.Stored
    coverage: Coverage | None


def route(
    model: str | Path,
    settings: RouteSettings = RouteSettings(),  # frozen
    outputs: Outputs = Outputs(),
) -> Routed:
    """Route text through the folder `model`, add `settings.merge`, and write what `outputs` asks for.

    Finished layers are kept in a folder beside `outputs.stats` until the end: the same call goes on
    from there after it was killed. Raises a MoequantError with one clear line when something is
    wrong; the text, the statistics to merge and the outputs are looked at before any work is done.
    """
    checkpoint = open_checkpoint(Path(model))
    _check(checkpoint, outputs)
    parts = _load(checkpoint, settings.merge)
    coverage = None
    pass_over = _resumable(outputs.stats, settings.resources)
    if settings.calib is not None or not parts:
        pool = calibration_pool(checkpoint, settings)
        check_memory(checkpoint, models=1)
        if settings.ratio > 0:
            budget = settings.max_tokens or BUDGET * settings.calib_tokens
            coverage = cover(
                checkpoint, pool, settings.calib_tokens, settings.ratio, budget, calibrate=pass_over
            )
        found = coverage.calibration if coverage else pass_over(checkpoint, pool)
        parts.append(store.stored(checkpoint, found))
    routed = Routed(checkpoint, store.merge(parts), coverage)
    write(routed, outputs)
    if outputs.stats is not None:
        shutil.rmtree(journals(outputs.stats), ignore_errors=True)
    return routed


def journals(stats: Path) -> Path:
    """Where a run that will write `stats` keeps what it has finished."""
    return stats.with_name(f"{stats.name}.journal")


def _resumable(stats: Path | None, resources: Resources) -> Calibrate:
    """A pass that keeps its finished layers beside `stats`, one folder for each text that is routed."""

    def pass_over(checkpoint: Checkpoint, rows: Rows) -> Calibration:
        if stats is None:
            return calibrate(checkpoint, rows, resources)
        folder = journals(stats) / digest(rows)[:16]
        return calibrate(checkpoint, rows, resources, journal=Journal(folder, checkpoint, rows))

    return pass_over


def write(routed: Routed, outputs: Outputs) -> None:
    """Every file that is wanted, each complete or not there at all."""
    calibration = routed.stored.calibration
    if outputs.stats is not None:
        store.save(outputs.stats, routed.stored)
    if outputs.imatrix is not None:
        imatrix.write(outputs.imatrix, routed.checkpoint, calibration, "none")
    if outputs.picture is not None:
        heatmap(calibration, outputs.picture)


def calibration_pool(checkpoint: Checkpoint, settings: RouteSettings) -> Rows:
    """The rows to calibrate on: `calib_tokens` of them, or all of the text to feed starved experts from."""
    encoder, tokenizer = load_encoder(checkpoint.path), read_tokenizer(checkpoint.path)
    bos = tokenizer.ids.get("bos") if tokenizer.add_bos else None
    documents = corpus.read(settings.calib, "calibration")
    every = corpus.pack(documents, encoder, ROW, None, settings.seed, bos)
    rows = corpus.spread(every, every.tokens if settings.ratio > 0 else settings.calib_tokens)
    return corpus.check(rows, max_length=checkpoint.shape.context, vocab_size=checkpoint.shape.vocab)


def _load(checkpoint: Checkpoint, files: tuple[Path, ...]) -> list[store.Stored]:
    """Statistics of this model from files, each once."""
    known: set[Path] = set()
    for file in files:
        if file.resolve() in known:
            raise CorpusError(f"{file}: named twice; its text would count twice")
        known.add(file.resolve())
    parts = [store.load(file) for file in files]
    for part in parts:
        store.check(checkpoint, part)
    return parts


def _check(checkpoint: Checkpoint, outputs: Outputs) -> None:
    """OutputError for an output that cannot be written."""
    wanted = [path for path in (outputs.stats, outputs.imatrix, outputs.picture) if path is not None]
    for path in wanted:
        check_output(path, outputs.overwrite)
    if len(set(wanted)) < len(wanted):
        raise OutputError(f"{wanted[0]}: one name for two outputs; give each its own")
    if outputs.picture is not None:
        check_picture(outputs.picture)
        if not checkpoint.n_experts:
            raise OutputError(f"{outputs.picture}: a dense model has no routers to draw")
