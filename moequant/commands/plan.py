"""Planning on its own: what a model costs at every size, before anything is converted."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from moequant import plan
from moequant.checkpoint import Checkpoint, Folder
from moequant.commands.statistics import load_statistics
from moequant.containers.gguf.container import GgufContainer
from moequant.containers.gguf.presets import facts
from moequant.containers.opened import open_model
from moequant.errors import PlanError
from moequant.escape import shown
from moequant.files import atomic, claim
from moequant.formats import Effort
from moequant.hub import Source
from moequant.hub.fetch import complete, headers, is_here
from moequant.plan import Budget, Sensitivities, curve, points, preset_points, prior_sensitivities
from moequant.plan.curve import Curve
from moequant.plan.measure import Probing, measure
from moequant.plan.menu import GgufMenu
from moequant.progress import Meter
from moequant.report.curve import draw
from moequant.report.routing import check_picture
from moequant.statistics.calibrate import calibrate
from moequant.text import corpus
from moequant.text.corpus import Rows
from moequant.text.rows import ROW, calibration_rows, split_probes


@dataclass(frozen=True, slots=True)
class PlanSettings:
    """How to measure a model, and which sizes to plan for.

    `calib` is a file, a folder, a .jsonl file or a dataset; None is the bundled text. `stats` are statistics
    that `moequant route` saved; they replace the calibration pass. Without `probes`, sensitivities come from
    tables of other models. `tensor_type` pins types, each `REGEX=TYPE`.

    `size` (bytes, as people write them), `bpw` and `type` (presets) name the sizes to plan for, each of them
    several with commas between them. PlanError for what is no size.
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

    def __post_init__(self) -> None:
        """See the class."""
        _ = self.budgets

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
    """What is known of a model before it is converted: its sensitivities, and loss against size.

    `overhead` is how many bytes of a file are not weights.
    """

    checkpoint: Checkpoint
    overhead: int
    sensitivities: Sensitivities
    curve: Curve


def survey(
    model: Source,
    settings: PlanSettings = PlanSettings(),  # frozen
    outputs: Outputs = Outputs(),
) -> Survey:
    """Measure `model`, a folder or a model of the Hub, plan it for every size and the whole curve, and write
    what `outputs` ask for.

    Raises a MoequantError with one clear line when something is wrong; outputs and budgets
    that no file can meet are refused before anything is measured.
    """
    source = headers(model)
    with claimed(outputs, *source.inputs, settings.calib, settings.stats), Meter().stage("plan"):
        found = _survey(source, settings, outputs)
        write(found, outputs)
    return found


def _survey(source: Folder, settings: PlanSettings, outputs: Outputs) -> Survey:
    budgets = settings.budgets
    file = GgufContainer(opened := open_model(source))
    checkpoint, known = file.checkpoint, facts(file.exported)
    bare = plan.plan_from_types(checkpoint.weights, {weight.name: "F32" for weight in checkpoint.weights})
    extra = file.overhead(bare)
    _check(outputs, budgets)
    weights = checkpoint.weights
    pins = plan.pinned(settings.tensor_type, weights, file.exported.names)
    points(weights, known, prior_sensitivities(weights, known.layers), extra, budgets, pins)
    if not is_here(source):
        file = GgufContainer(opened := open_model(complete(source)))
        checkpoint = file.checkpoint
        weights = checkpoint.weights
    calib_rows, probe_rows = _texts(checkpoint, file.tokenizer.leading, settings)
    if settings.stats is not None:
        calibration = load_statistics(opened, checkpoint, settings.stats).calibration
    else:
        calibration = calibrate(checkpoint, calib_rows)
    ids = probe_rows.ids if settings.probes else None
    found = measure(checkpoint, calibration, ids, Probing(effort=settings.effort), GgufMenu(pins))
    drawn = Curve(
        shown(opened.source),
        curve(weights, known, found, extra, pins=pins),
        points(weights, known, found, extra, budgets, pins),
        preset_points(weights, known, found, extra, pins),
        sum(weight.numel for weight in weights),
        found.source,
    )
    return Survey(checkpoint, extra, found, drawn)


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


def _texts(checkpoint: Checkpoint, bos: int | None, settings: PlanSettings) -> tuple[Rows, Rows]:
    """Rows to calibrate on, and others for the probes."""
    most = Probing().rows
    documents = corpus.read(settings.calib, "calibration")
    tokens = settings.calib_tokens + most * ROW
    return split_probes(calibration_rows(checkpoint, documents, tokens, settings.seed, bos), most)
