"""Planning on its own: what a model costs at every size, before anything is converted."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from moequant import plan
from moequant.checkpoint import Checkpoint, Folder
from moequant.commands.statistics import load_statistics
from moequant.commands.text import leading
from moequant.containers.folders.container import FolderContainer
from moequant.containers.folders.plan import FolderSettings
from moequant.containers.gguf.container import GgufContainer
from moequant.containers.gguf.presets import facts
from moequant.containers.opened import open_model
from moequant.errors import PlanError
from moequant.escape import shown
from moequant.files import atomic, claim
from moequant.formats import Effort
from moequant.forward.resources import Resources
from moequant.hub import Source
from moequant.hub.fetch import complete, headers, is_here
from moequant.plan import Budget, Point, Sensitivities, curve, points, preset_points
from moequant.plan.curve import Curve, PlannedFormat
from moequant.plan.folder_curve import FolderPoints
from moequant.plan.folders import FolderMenu
from moequant.plan.measure import Probing, measure
from moequant.plan.menu import GgufMenu, Menu
from moequant.progress import Meter
from moequant.report.curve import draw
from moequant.report.routing import check_picture
from moequant.statistics.calibrate import calibrate
from moequant.text import corpus
from moequant.text.corpus import Rows
from moequant.text.rows import probed_rows

_OF_FILES = ("bpw", "type", "tensor_type")
_OF_FOLDERS = ("schemes", "gpu", "tp")


@dataclass(frozen=True, slots=True)
class PlanSettings:
    """How to measure a model, and which sizes to plan for.

    `calib` is a file, a folder, a .jsonl file or a dataset; None is the bundled text. `stats` are statistics
    that `moequant route` saved; they replace the calibration pass. Without `probes`, sensitivities come from
    tables of other models. `tensor_type` pins types, each `REGEX=TYPE`.

    `size` (bytes, as people write them), `bpw` and `type` (presets) name the sizes to plan for, each of them
    several with commas between them.

    `format` chooses a GGUF file or a folder. A folder has sizes in bytes only, and no pinned types; `schemes`
    are those to choose from, `gpu` is the compute capability of the GPU that will serve it, and `tp` how many
    GPUs will share each weight.

    `resources` are the memory and the device that are used; they do not change what is found.

    PlanError for what is no size, and for an option that the format does not have.
    """

    calib: str | Path | None = None
    calib_tokens: int = 131_072
    stats: Path | None = None
    probes: bool = True
    effort: Effort = "default"
    seed: int = 0
    tensor_type: tuple[str, ...] = ()
    size: str | None = None
    bpw: str | None = None
    type: str | None = None
    format: PlannedFormat = "gguf"
    schemes: str | None = None
    gpu: float | None = None
    tp: int | None = None
    resources: Resources = field(default_factory=Resources)

    def __post_init__(self) -> None:
        """See the class."""
        foreign = _OF_FOLDERS if self.format == "gguf" else _OF_FILES
        if given := [name for name in foreign if getattr(self, name) not in (None, ())]:
            other = (
                "it is for a folder, --format safetensors"
                if self.format == "gguf"
                else "a folder is planned by --sizes, and the plan that -o writes may be edited"
            )
            raise PlanError(
                f"--{given[0].replace('_', '-')} does not go with --format {self.format}; {other}"
            )
        _ = self.budgets

    @property
    def folder(self) -> FolderSettings:
        """What was asked for of a folder."""
        return FolderSettings(schemes=self.schemes, gpu=self.gpu, tp=1 if self.tp is None else self.tp)

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """The sizes that are named, in this order of kinds."""
        kinds = ((self.size, Budget.of_size), (self.bpw, Budget.of_bpw), (self.type, Budget.of_preset))
        return tuple(
            make(part.strip()) for text, make in kinds if text is not None for part in text.split(",")
        )


@dataclass(frozen=True, slots=True)
class Outputs:
    """Files to write, None for those not wanted: the one plan that was asked for, and the curve's picture."""

    plan: Path | None = None
    picture: Path | None = None
    overwrite: bool = False


@dataclass(frozen=True, slots=True)
class Survey:
    """What is known of a model before it is converted: its sensitivities, and loss against size."""

    checkpoint: Checkpoint
    sensitivities: Sensitivities
    curve: Curve


class _Planned(Protocol):
    """What is planned: a GGUF file, or a folder."""

    @property
    def checkpoint(self) -> Checkpoint:
        """The model as the output cuts it."""

    @property
    def menu(self) -> Menu:
        """What its plans choose from."""

    def points(self, known: Sensitivities, budgets: Sequence[Budget]) -> list[Point]:
        """The best plans for these budgets; PlanError for one that no output meets."""

    def curve(self, known: Sensitivities, budgets: Sequence[Budget], title: str) -> Curve:
        """Everything that is drawn."""


class _File:
    """A GGUF file."""

    def __init__(self, model: Checkpoint, settings: PlanSettings) -> None:
        file = GgufContainer(model)
        self.checkpoint, self._facts = file.checkpoint, facts(file.exported)
        weights = self.checkpoint.weights
        self._extra = file.overhead(
            plan.plan_from_types(weights, {w.name: w.fixed_type or "F32" for w in weights})
        )
        self._pins = plan.pinned(settings.tensor_type, weights, file.exported.names)
        self.menu: Menu = GgufMenu(self._pins)

    def points(self, known: Sensitivities, budgets: Sequence[Budget]) -> list[Point]:
        """See `_Planned`."""
        return points(self.checkpoint.weights, self._facts, known, self._extra, budgets, self._pins)

    def curve(self, known: Sensitivities, budgets: Sequence[Budget], title: str) -> Curve:
        """See `_Planned`."""
        weights = self.checkpoint.weights
        return Curve(
            title,
            curve(weights, self._facts, known, self._extra, pins=self._pins),
            self.points(known, budgets),
            preset_points(weights, self._facts, known, self._extra, self._pins),
            sum(weight.numel for weight in weights),
            known.source,
        )


class _Folder:
    """A quantized folder."""

    def __init__(self, model: Checkpoint, settings: PlanSettings) -> None:
        folder = FolderContainer(model, settings.folder)
        self.checkpoint, self._size = folder.checkpoint, folder.size
        self.menu = FolderMenu.of(self.checkpoint, folder.settings)

    def points(self, known: Sensitivities, budgets: Sequence[Budget]) -> list[Point]:
        """See `_Planned`."""
        return FolderPoints(self.menu, self._size, known).of(budgets)

    def curve(self, known: Sensitivities, budgets: Sequence[Budget], title: str) -> Curve:
        """See `_Planned`."""
        found = FolderPoints(self.menu, self._size, known)
        return Curve(
            title,
            found.curve(),
            found.of(budgets),
            found.uniform(),
            sum(weight.numel for weight in self.checkpoint.weights),
            known.source,
            "safetensors",
        )


def survey(
    model: Source,
    settings: PlanSettings = PlanSettings(),  # frozen
    outputs: Outputs = Outputs(),
) -> Survey:
    """Measure `model`, a folder or a model of the Hub, plan it for every size and the whole curve, and write
    what `outputs` ask for.

    Raises a MoequantError with one clear line when something is wrong; outputs and budgets
    that no output can meet are refused before anything is measured.
    """
    source = headers(model)
    with claimed(outputs, *source.inputs, settings.calib, settings.stats), Meter().stage("plan"):
        found = _survey(source, settings, outputs)
        write(found, outputs)
    return found


def _survey(source: Folder, settings: PlanSettings, outputs: Outputs) -> Survey:
    budgets = settings.budgets
    made = _planned(opened := open_model(source), settings)
    _check(outputs, budgets)
    made.points(made.menu.prior(made.checkpoint.weights, made.checkpoint.n_layers), budgets)
    if not is_here(source):
        made = _planned(opened := open_model(complete(source)), settings)
    calib_rows, probe_rows = _texts(opened, settings)
    if settings.stats is not None:
        calibration = load_statistics(opened, made.checkpoint, settings.stats).calibration
    else:
        calibration = calibrate(made.checkpoint, calib_rows, settings.resources)
    ids = probe_rows.ids if settings.probes else None
    probing = Probing(effort=settings.effort, menu=made.menu)
    found = measure(made.checkpoint, calibration, ids, probing, settings.resources)
    return Survey(made.checkpoint, found, made.curve(found, budgets, shown(opened.source)))


def _planned(model: Checkpoint, settings: PlanSettings) -> _Planned:
    return _File(model, settings) if settings.format == "gguf" else _Folder(model, settings)


def write(found: Survey, outputs: Outputs) -> None:
    """Every file that is wanted, each complete or not there at all. OutputError when the disk refuses."""
    if outputs.plan is not None:
        chosen = found.curve.wanted[0].plan
        assert chosen is not None
        with atomic(outputs.plan) as partial:
            partial.write_text(plan.to_json(chosen), encoding="utf-8")
    if outputs.picture is not None:
        draw(found.curve, outputs.picture)


def claimed(outputs: Outputs, *inputs: str | Path | None) -> AbstractContextManager[None]:
    """The outputs, locked; OutputError when one cannot be written or is one of `inputs`."""
    return claim(outputs.plan, outputs.picture, overwrite=outputs.overwrite, inputs=inputs)


def _check(outputs: Outputs, budgets: tuple[Budget, ...]) -> None:
    """Errors for outputs that cannot hold what is wanted."""
    if outputs.picture is not None:
        check_picture(outputs.picture)
    if outputs.plan is not None and len(budgets) != 1:
        raise PlanError(
            f"{outputs.plan}: holds one plan, {len(budgets)} were asked for; give one size, --bpw or --type"
        )


def _texts(model: Checkpoint, settings: PlanSettings) -> tuple[Rows, Rows]:
    """Rows to calibrate on, and others for the probes."""
    documents = corpus.read(settings.calib, "calibration")
    return probed_rows(model, documents, settings.calib_tokens, settings.seed, leading(model), Probing().rows)
