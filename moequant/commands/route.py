"""Routing on its own: statistics of a model on some text, collected, merged, written down."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from moequant.checkpoint import Checkpoint, Folder
from moequant.commands.statistics import all_sites, load_statistics, with_all
from moequant.commands.text import leading
from moequant.containers.gguf import imatrix
from moequant.containers.gguf.export import export
from moequant.containers.opened import open_model
from moequant.errors import CorpusError, OutputError, PlanError
from moequant.files import JOURNAL, claim
from moequant.forward.memory import check_memory
from moequant.forward.resources import Resources
from moequant.hub import Source
from moequant.hub.fetch import complete, headers, is_here
from moequant.progress import Meter
from moequant.report.routing import check_picture, heatmap
from moequant.statistics import store
from moequant.statistics.calibrate import calibrate
from moequant.statistics.coverage import Coverage, cover
from moequant.statistics.journal import Journal, check_journals, digest
from moequant.text import corpus
from moequant.text.corpus import Rows
from moequant.text.rows import load_encoder, row_length
from moequant.values import Calibration

BUDGET = 4
"""Feeding starved experts may take so many times the tokens of the first draw, unless told otherwise."""


MOST_SHARES = 1_000_000
"""Nobody has so much text that an expert could see more times its fair share."""


@dataclass(frozen=True, slots=True)
class RouteSettings:
    """Which text to route through the model, and which statistics to add.

    `calib` is a file, a folder, a .jsonl file or a dataset; None is the bundled text. With `ratio` above 0
    more rows are drawn, until every expert saw that multiple of its fair share of `calib_tokens`, at most
    `max_tokens` in all. The statistics in the files `merge` are added. With `merge` and without `calib` no
    text is routed.
    """

    calib: str | Path | None = None
    calib_tokens: int = 131_072
    seed: int = 0
    ratio: float = 0.0
    max_tokens: int | None = None
    merge: tuple[Path, ...] = ()
    resources: Resources = field(default_factory=Resources)

    def __post_init__(self) -> None:
        """PlanError for a multiple that is none."""
        if not 0 <= self.ratio <= MOST_SHARES:
            raise PlanError(
                f"--min-tokens-per-expert {self.ratio}: a number from 0 to {MOST_SHARES:,} was expected"
            )


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
    model: Source,
    settings: RouteSettings = RouteSettings(),  # frozen
    outputs: Outputs = Outputs(),
) -> Routed:
    """Route text through `model`, a folder or a model of the Hub, and write what `outputs` asks for.

    `settings.merge` is added. Finished layers are kept in a folder beside `outputs.stats` until the end: the
    same call goes on from there after it was killed. Raises a MoequantError with one clear line when
    something is wrong; the text, the statistics to merge and the outputs are looked at before any work.
    """
    source = headers(model)
    with claimed(outputs, *source.inputs, settings.calib, *settings.merge), Meter().stage("route"):
        return _route(source, settings, outputs)


def _route(source: Folder, settings: RouteSettings, outputs: Outputs) -> Routed:
    checkpoint = open_model(source)
    _check(checkpoint, outputs)
    parts = _load(checkpoint, settings.merge)
    coverage = None
    passes = _Passes(outputs.stats, settings.resources)
    if settings.calib is not None or not parts:
        pool = calibration_pool(checkpoint, settings)
        check_memory(checkpoint, models=1)
        checkpoint = checkpoint if is_here(source) else open_model(complete(source))
        if settings.ratio > 0:
            budget = settings.max_tokens or BUDGET * settings.calib_tokens
            coverage = cover(
                checkpoint, pool, settings.calib_tokens, settings.ratio, budget, calibrate=passes.calibrate
            )
        found = coverage.calibration if coverage else passes.calibrate(checkpoint, pool)
        parts.append(store.stored(checkpoint, found))
    routed = Routed(checkpoint, store.merge(parts), coverage)
    write(routed, outputs)
    passes.forget()
    return routed


def journals(stats: Path) -> Path:
    """Where a run that will write `stats` keeps what it has finished."""
    return stats.with_name(f"{stats.name}{JOURNAL}")


class _Passes:
    """Passes that keep their finished layers beside `stats`, one folder for each text that is routed."""

    def __init__(self, stats: Path | None, resources: Resources) -> None:
        self._stats, self._resources = stats, resources
        self._journals: list[Journal] = []

    def calibrate(self, checkpoint: Checkpoint, rows: Rows) -> Calibration:
        """Statistics of `rows`, from where a killed run stopped."""
        if self._stats is None:
            return calibrate(checkpoint, rows, self._resources, watched=all_sites(checkpoint))
        try:
            journal = Journal(journals(self._stats) / digest(rows)[:16], checkpoint, rows)
            self._journals.append(journal)
            return calibrate(
                checkpoint, rows, self._resources, journal=journal, watched=all_sites(checkpoint)
            )
        except BaseException:
            for journal in self._journals:
                journal.leave()
            self._tidy()
            raise

    def forget(self) -> None:
        """Remove what this run kept. What a run on another text has kept stays, for it to go on from."""
        for journal in self._journals:
            journal.remove()
        self._tidy()

    def _tidy(self) -> None:
        """Remove the folder of the journals when there is none."""
        around = None if self._stats is None else journals(self._stats)
        if around is not None and around.is_dir() and not any(around.iterdir()):
            around.rmdir()


def write(routed: Routed, outputs: Outputs) -> None:
    """Every file that is wanted, each complete or not there at all."""
    calibration = routed.stored.calibration
    with claimed(outputs):
        if outputs.stats is not None:
            store.save(outputs.stats, routed.stored)
        if outputs.imatrix is not None:
            imatrix.write(outputs.imatrix, export(routed.checkpoint), calibration, "none")
        if outputs.picture is not None:
            heatmap(calibration, outputs.picture)


def claimed(outputs: Outputs, *inputs: str | Path | None) -> AbstractContextManager[None]:
    """The outputs, locked; OutputError when one cannot be written or is one of `inputs`."""
    return claim(outputs.stats, outputs.imatrix, outputs.picture, overwrite=outputs.overwrite, inputs=inputs)


def calibration_pool(checkpoint: Checkpoint, settings: RouteSettings) -> Rows:
    """The rows to calibrate on: `calib_tokens` of them, or all of the text to feed starved experts from."""
    encoder, bos = load_encoder(checkpoint.path), leading(checkpoint)
    documents = corpus.read(settings.calib, "calibration")
    every = corpus.pack(documents, encoder, row_length(checkpoint), None, settings.seed, bos)
    rows = corpus.spread(every, every.tokens if settings.ratio > 0 else settings.calib_tokens)
    return corpus.check(rows, max_length=checkpoint.shape.context, vocab_size=checkpoint.shape.vocab)


def _load(checkpoint: Checkpoint, files: tuple[Path, ...]) -> list[store.Stored]:
    """Statistics of this model from files, each once."""
    known: dict[Path, store.Stored] = {}
    for file in files:
        found = load_statistics(checkpoint, with_all(checkpoint), file)
        if (real := file.resolve()) in known:
            raise CorpusError(f"{file}: named twice; its text would count twice")
        known[real] = found
    return list(known.values())


def _check(checkpoint: Checkpoint, outputs: Outputs) -> None:
    """OutputError for an output that cannot be written."""
    if outputs.imatrix is not None:
        export(checkpoint)  # says why not, where llama.cpp has no such model
    if outputs.stats is not None:
        check_journals(journals(outputs.stats))
    if outputs.picture is not None:
        check_picture(outputs.picture)
        if not checkpoint.n_experts:
            raise OutputError(f"{outputs.picture}: a dense model has no routers to draw")
