"""The verbs of moequant as functions: a model, frozen settings, and a result that can be shown and kept.

A model is a folder, a GGUF file where that makes sense, or a name of the Hub (`OWNER/NAME`, `@REVISION`,
`:FILE.gguf`), as text or as a path. Every verb takes `progress`, which is called with a `Progress` at every
step, in the thread that works; what it raises ends the run and leaves no half of a file. What goes wrong on
purpose is a MoequantError whose text is one line. `convert`, `convert_all`, `plan` and `route` also take a
`GgufModel`, a GGUF file with a folder or Hub name for its config.json and tokenizer.

Results have `.summary()` (text), `.to_json()` (what the command prints with --json), `.save(path)` (.json,
.html or .txt) and show themselves in notebooks. Sizes are bytes, times seconds, speeds tokens per second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moequant import inspection
from moequant.check.figures import CheckReport
from moequant.commands import check as checking
from moequant.commands import compare as comparing
from moequant.commands import convert as converting
from moequant.commands import plan as planning
from moequant.commands import route as routing
from moequant.commands.check import CheckSettings
from moequant.commands.compare import CompareSettings
from moequant.commands.plan import Outputs as PlanOutputs
from moequant.commands.plan import PlanSettings, Survey
from moequant.commands.route import Outputs as RouteOutputs
from moequant.commands.route import Routed, RouteSettings
from moequant.commands.settings import Settings
from moequant.evaluate.compared import Compared
from moequant.hub import GgufModel, Model, Source, located
from moequant.inspection import Inspection, served
from moequant.inspection import fit as fitting
from moequant.inspection.fit import Fit, Hardware
from moequant.inspection.served import FolderFit, Gpus
from moequant.progress import Listener, listening
from moequant.report import compare_page
from moequant.report.check import check_json, check_report
from moequant.report.compare import compare_tables, compare_value
from moequant.report.conversion import Conversion
from moequant.report.curve import curve_tables
from moequant.report.fit import fit_json, fit_report
from moequant.report.inspect import inspection_json, inspection_report
from moequant.report.machine import survey_json
from moequant.report.routing import routing_json, routing_tables
from moequant.report.served import served_json, served_report
from moequant.report.shown import Result, View
from moequant.report.summary import Report
from moequant.runtimes.llama_cpp.kv_cache import Load
from moequant.runtimes.vllm.memory import Serving
from moequant.statistics.health import health

__all__ = [
    "CheckSettings",
    "CompareSettings",
    "Conversion",
    "FitSettings",
    "FolderFitSettings",
    "GgufModel",
    "Gpus",
    "Hardware",
    "Load",
    "PlanOutputs",
    "PlanSettings",
    "Report",
    "Result",
    "RouteOutputs",
    "RouteSettings",
    "Serving",
    "Settings",
    "check",
    "compare",
    "convert",
    "convert_all",
    "fit",
    "fit_folder",
    "inspect",
    "plan",
    "route",
]

INSPECTED = View("inspect", inspection_report, inspection_json)
FITTED = View("fit", fit_report, fit_json)
SERVED = View("fit", served_report, served_json)
PLANNED: View[Survey] = View(
    "plan", lambda found: curve_tables(found.curve), lambda found: survey_json(found.curve)
)
ROUTED: View[Routed] = View(
    "route",
    lambda found: routing_tables(health(found.stored.calibration), found.coverage),
    lambda found: routing_json(health(found.stored.calibration), found.stored.calibration, found.coverage),
)
COMPARED = View("compare", compare_tables, compare_value, compare_page.page)
CHECKED = View("check", check_report, check_json)


@dataclass(frozen=True, slots=True)
class FitSettings:
    """A machine, what is served on it, and the least speed.

    `hardware` has the bytes of GPU and system memory, and the bytes per second of each; those of the disk
    too, if experts may stay on it. `load` has the tokens of context of a sequence, how many sequences are
    served at once, and the type of the KV cache. Files whose upper bound of speed is below `min_speed` tokens
    per second are left out.
    """

    hardware: Hardware
    load: Load = Load(8192)  # frozen
    min_speed: float = 0.0


@dataclass(frozen=True, slots=True)
class FolderFitSettings:
    """GPUs, what vLLM serves on them, and what may be made of the model.

    `gpus` has the bytes of memory of each GPU. `serving` has the tokens of context of a sequence, how many
    sequences are served at once, how many GPUs share every weight, and the type of the KV cache. `schemes`,
    by commas, are those to try, and `gpu` is the compute capability of the GPUs.
    """

    gpus: Gpus
    serving: Serving = Serving(8192)  # frozen
    schemes: str | None = None
    gpu: float | None = None


def inspect(model: Model, progress: Listener | None = None) -> Result[Inspection]:
    """Describe a model from its headers; no weight is read.

    `found` has parameters (all, and those that one token meets), bytes by role and type, the exact size in
    bytes of every preset, what the tokenizer is, and which runtimes know the model. CheckpointError for what
    is no model; HubError for a model of the Hub that is not to be had.
    """
    with listening(progress):
        return Result(inspection.inspect(model), INSPECTED)


def fit(model: Model, settings: FitSettings, progress: Listener | None = None) -> Result[Fit]:
    """Say which files of a model fit on a machine, where their experts go, and how fast they can be.

    `found.best` is None where nothing fits. Speeds are upper bounds: bytes read for a token over bytes per
    second. CheckpointError as `inspect`; PlanError for a load that the model cannot have.
    """
    with listening(progress):
        found = fitting.fit(located(model), settings.hardware, settings.load, settings.min_speed)
        return Result(found, FITTED)


def fit_folder(
    model: Model, settings: FolderFitSettings, progress: Listener | None = None
) -> Result[FolderFit]:
    """Say which folders of a model fit on one or several GPUs when vLLM serves them: as it is stored, in
    every scheme, and in the largest mixture.

    `found.best` is None where nothing fits. Figures follow vLLM's code; speeds are upper bounds.
    CheckpointError as `inspect`; PlanError for a load that the model cannot have.
    """
    with listening(progress):
        found = served.fit_folder(
            located(model), settings.gpus, settings.serving, settings.schemes, settings.gpu
        )
        return Result(found, SERVED)


def plan(
    model: Source,
    settings: PlanSettings = PlanSettings(),  # frozen
    outputs: PlanOutputs = PlanOutputs(),
    progress: Listener | None = None,
) -> Result[Survey]:
    """Measure what every type costs every weight, and find the best mix for each size that is named.

    `found.curve` has (file bytes, predicted KL divergence in nats per token) of every size worth having, and
    the plans that were asked for. `outputs` may name files for the one plan and for a picture. PlanError for
    a size that no file can have.
    """
    with listening(progress):
        return Result(planning.survey(model, settings, outputs), PLANNED)


def route(
    model: Source,
    settings: RouteSettings = RouteSettings(),  # frozen
    outputs: RouteOutputs = RouteOutputs(),
    progress: Listener | None = None,
) -> Result[Routed]:
    """Route text through a model and count what every expert saw.

    `found.stored.calibration.routes` has, for each layer with a router, tokens i64 [experts] and sums of
    router weights f64 [experts]; `.inputs` the moments f64 [experts, columns] of what every weight was fed.
    `outputs` may name files for statistics, an imatrix and a picture; a run that was killed goes on where it
    stopped. CorpusError for text that is too short or cannot be read.
    """
    with listening(progress):
        return Result(routing.route(model, settings, outputs), ROUTED)


def convert(
    model: Source,
    out: str | Path,
    settings: Settings = Settings(),  # frozen
    progress: Listener | None = None,
) -> Report:
    """Quantize a model into `out`, a GGUF file or a folder, and report what it cost.

    The report has the plan (a type for every weight), `losses` (relative squared error f64 [experts] of every
    weight's outputs, tokens i64 [experts]) and, unless `eval_tokens` is 0, `comparison`: perplexity and KL
    divergence (nats per token) with standard errors. `out` appears when it was read again and found whole;
    else it is as it was before. PlanError where `settings` name several sizes.
    """
    with listening(progress):
        return converting.convert(model, out, settings)


def convert_all(
    model: Source,
    out: str | Path,
    settings: Settings = Settings(),  # frozen
    progress: Listener | None = None,
) -> Conversion:
    """Quantize a model to every size that `settings` name, such as `type="Q4_K_M,Q3_K_M"`. It is read,
    measured and compared once for all of them.

    `out` is a folder, or a name with `{type}` in it. `reports` has a report for each file, in the order of
    the sizes. Each file has the bytes that it would have alone; where one fails, those before it stay.
    """
    with listening(progress):
        return converting.convert_all(model, out, settings)


def compare(
    base: Model,
    candidates: Sequence[Model],
    settings: CompareSettings = CompareSettings(),  # frozen
    progress: Listener | None = None,
) -> Result[Compared]:
    """Score candidates against a baseline: GGUF files, folders and names of the Hub, in any mix.

    `found.measured` has for every candidate perplexity and KL divergence (nats per token, standard errors
    over tokens), the relative squared error f64 [experts] of every weight, and the share of tokens that take
    other experts, layer by layer. CheckpointError for versions of different models; CorpusError for text
    that is too short.
    """
    with listening(progress):
        return Result(comparing.run(base, candidates, settings), COMPARED)


def check(
    out: Model,
    settings: CheckSettings = CheckSettings(),  # frozen
    progress: Listener | None = None,
) -> Result[CheckReport]:
    """Check a GGUF file or a quantized folder: its bytes, and with a baseline every expert.

    `found.holds` says whether all is well, `found.damages` what is not and where. VerifyError for a file
    that cannot be read at all, or a baseline that does not fit.
    """
    with listening(progress):
        return Result(checking.check(out, settings), CHECKED)
