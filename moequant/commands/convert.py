"""The straight line: open, route, plan, quantize, pack, verify, report; one for every container."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from moequant import plan
from moequant.checkpoint import Checkpoint, load, open_checkpoint
from moequant.commands.settings import Settings
from moequant.commands.statistics import all_sites, given_statistics
from moequant.commands.text import leading
from moequant.containers.base import Container, Made, Written
from moequant.containers.folders.container import FolderContainer
from moequant.containers.gguf import imatrix
from moequant.containers.gguf.container import GgufContainer
from moequant.containers.gguf.export import export
from moequant.containers.gguf.presets import facts
from moequant.evaluate import Comparison
from moequant.evaluate.self_check import self_check
from moequant.evaluate.side_by_side import Version, compare
from moequant.files import atomic, atomic_folder, claim
from moequant.forward.memory import check_memory
from moequant.forward.model import empty_model
from moequant.plan.folders import FolderMenu, budget_plan
from moequant.plan.measure import Probing, measure, wants_probes
from moequant.plan.menu import GGUF
from moequant.progress import Meter
from moequant.report import Report
from moequant.rounding.coupled import UNROUNDED, Rounding
from moequant.rounding.diagonal import Quantizer, pack_all, progress
from moequant.rounding.layerwise import round_checkpoint
from moequant.statistics.calibrate import calibrate
from moequant.statistics.fisher import Needs, needs
from moequant.statistics.fisher import check_memory as fits
from moequant.text import corpus
from moequant.text.corpus import Rows
from moequant.text.rows import ROW, calibration_rows, split_probes, token_rows
from moequant.values import Calibration, ExpertLoss, Packed, Plan

__all__ = ["Job", "Settings", "convert", "gradients", "open_job"]

DEFAULT = Settings()

LEFT_BY_HESSIANS = 0.78
"""Share of the plain search's KL divergence that rounding under Hessians leaves: seen on held-out
calibration text of a trained model, at llama.cpp's types for Q2_K_S."""

LEFT_COUPLED = 0.55
"""The same with coupled streams: 0.62 seen there, 0.48 on the demo model at Q4_K_M; between the two."""


@dataclass(frozen=True, slots=True)
class Job:
    """Everything known before any weight is read: headers, tokenizer, types, exact size."""

    model: Checkpoint
    container: Container
    plan: Plan
    settings: Settings

    @property
    def size(self) -> int:
        """Bytes of what comes out, with the types of `plan`."""
        return self.container.size(self.plan)

    @property
    def quantizes(self) -> bool:
        """Whether any weight is rounded, so that calibration has something to say."""
        return any(name not in UNROUNDED for name in self.container.formats(self.plan).values())

    @property
    def keeps(self) -> bool:
        """Whether every number of the checkpoint is kept."""
        own = {weight.name: weight.origin.dtype for weight in self.container.checkpoint.weights}
        types = self.container.formats(self.plan)
        return all(name in ("F32", own[weight]) for weight, name in types.items())

    @property
    def measures(self) -> bool:
        """Whether types are still to be measured."""
        if isinstance(self.container, GgufContainer):
            is_open = self.settings.plan is None
        else:
            is_open = self.settings.size is not None
        return is_open and self.quantizes and self.settings.effort != "fast"

    @property
    def limit(self) -> int | None:
        """The largest file that may come out when types are still to be measured, None when they stay."""
        if not self.measures:
            return None
        if not isinstance(self.container, GgufContainer):
            return self.plan.budget
        return self.container.overhead(self.plan) + self.plan.budget


def open_job(model: Path, settings: Settings) -> Job:
    """Read headers and tokenizer, choose every type that is known before measuring. Raises what those
    raise."""
    checkpoint = open_checkpoint(model)
    if settings.format != "gguf":
        folder = FolderContainer(checkpoint, settings.folder)
        return Job(checkpoint, folder, _schemes(folder, settings), settings)
    file = GgufContainer(checkpoint)
    if settings.plan is not None:
        return Job(
            checkpoint,
            file,
            plan.read(settings.plan, file.checkpoint.weights, file.exported.own_names),
            settings,
        )
    return Job(checkpoint, file, _chosen(file, settings), settings)


def convert(model: str | Path, out: str | Path, settings: Settings = DEFAULT) -> Report:
    """Quantize the Hugging Face folder `model` into `out`, a GGUF file or a folder, and report what it cost.

    Raises a MoequantError with one clear line when something is wrong; `out` is then
    absent, or as it was before.
    """
    out = Path(out)
    is_file = settings.format == "gguf"
    outputs = claim(
        *([out] if is_file else []),
        settings.imatrix_out,
        folder=None if is_file else out,
        overwrite=settings.overwrite,
        inputs=(model, *settings.inputs),
    )
    with outputs:
        return _convert(Path(model), out, settings)


def _convert(model: Path, out: Path, settings: Settings) -> Report:
    meter = Meter()
    with meter.stage("open"):
        job = open_job(model, settings)
        job.container.check_target(out, job.plan)
        checkpoint = job.container.checkpoint
        empty_model(checkpoint)  # every weight has its place in the model, before any is read
        matrices = export(job.model) if settings.imatrix_out is not None else None
        calibration = given_statistics(job.model, checkpoint, settings)
        texts = _texts(job, calibration is not None)
        check_memory(checkpoint, models=2 if texts.evaluation else 1 if texts.calibration else 0)
        if texts.calibration is not None:
            gradients(checkpoint, settings)
    if texts.calibration is not None and calibration is None and _needs_statistics(job):
        with meter.stage("route"):
            watched = None if matrices is None else all_sites(job.model)
            calibration = calibrate(checkpoint, texts.calibration, settings.resources, watched=watched)
    if calibration is not None and matrices is not None and settings.imatrix_out is not None:
        imatrix.write(settings.imatrix_out, matrices, calibration, "none")
    if calibration is not None and texts.probes is not None:
        with meter.stage("plan"):
            job = _measured(job, calibration, texts.probes)
    losses: list[ExpertLoss] = []
    comparison: Comparison | None = None
    with atomic_folder(out) if job.container.is_folder else atomic(out) as partial:
        with meter.stage("quantize"):
            packed = _rounded(job, calibration, texts.calibration, losses)
            written = job.container.write(partial, job.plan, packed)
        with meter.stage("verify"):
            job.container.verify(written, job.plan)
        checked = None
        if settings.self_check:
            with meter.stage("self-check"):
                decoded = job.container.open(written.path).load if job.keeps else None
                checked = self_check(job.model, decoded)
        if texts.evaluation is not None:
            with meter.stage("compare"):
                comparison = _compared(job, written, out.name, texts.evaluation)
        job.container.describe(partial, _made(job, calibration, texts.calibration, comparison))
    return Report(
        model=model,
        out=out,
        file_bytes=written.bytes,
        checkpoint=checkpoint,
        plan=job.plan,
        calibration=calibration,
        losses=tuple(losses),
        comparison=comparison,
        stages=tuple(meter.costs),
        notes=(*_notes(job), *([checked.note] if checked is not None else [])),
    )


def gradients(checkpoint: Checkpoint, settings: Settings) -> Needs | None:
    """What the gradients of effort best take, None at other efforts. CheckpointError: more than there is."""
    tokens = min(Rounding.of(settings.effort).fisher_tokens, settings.calib_tokens)
    if not tokens:
        return None
    needed = needs(checkpoint, tokens, settings.device)
    fits(needed, settings.device)
    return needed


def _needs_statistics(job: Job) -> bool:
    """Whether something is made of statistics: integers of a folder are rounded under Hessians alone."""
    is_file = isinstance(job.container, GgufContainer)
    return is_file or job.measures or job.settings.effort == "fast" or job.settings.imatrix_out is not None


def _chosen(file: GgufContainer, settings: Settings, sensitivities: plan.Sensitivities | None = None) -> Plan:
    """The best plan of the size that was asked for."""
    weights = file.checkpoint.weights
    bare = plan.plan_from_types(weights, {weight.name: "F32" for weight in weights})
    overhead = file.overhead(bare)
    return plan.make_plan(weights, settings.budget, facts(file.exported), sensitivities, overhead)


def _schemes(
    folder: FolderContainer, settings: Settings, sensitivities: plan.Sensitivities | None = None
) -> Plan:
    """The one scheme of a folder, or the best schemes of the size that was asked for."""
    if settings.size is None:
        return folder.plan
    menu = FolderMenu.of(folder.checkpoint, folder.settings)
    return budget_plan(menu, settings.budget, folder.size, sensitivities)


def _measured(job: Job, calibration: Calibration, probes: Rows) -> Job:
    """The same with types chosen by what each would cost this model, measured."""
    checkpoint, settings, container = job.container.checkpoint, job.settings, job.container
    ids = probes.ids if wants_probes(checkpoint) else None
    menu = FolderMenu.of(checkpoint, settings.folder) if isinstance(container, FolderContainer) else GGUF
    sensitivities = measure(checkpoint, calibration, ids, Probing(gating=settings.gating), menu)
    left = LEFT_COUPLED if settings.coupled else LEFT_BY_HESSIANS
    sensitivities = sensitivities.after({name: left for row in sensitivities.table.values() for name in row})
    if isinstance(container, FolderContainer):
        return replace(job, plan=_schemes(container, settings, sensitivities))
    assert isinstance(container, GgufContainer)
    return replace(job, plan=_chosen(container, settings, sensitivities))


def _rounded(
    job: Job, calibration: Calibration | None, rows: Rows | None, losses: list[ExpertLoss]
) -> Iterator[Packed]:
    """Every weight that is packed, in the plan's order: by the plain search at effort fast, else under
    Hessians."""
    settings, checkpoint = job.settings, job.container.checkpoint
    types = job.container.formats(job.plan)
    planned = {choice.weight: choice.format for choice in job.plan.choices}
    quantizer = Quantizer(calibration, settings.effort, settings.gating)
    if rows is None or settings.effort == "fast":
        found = pack_all(checkpoint, types, quantizer)
    else:
        rounding = Rounding.of(settings.effort, settings.coupled)
        found = round_checkpoint(checkpoint, rows.ids, types, quantizer.pack, rounding, settings.resources)
    for packed, loss in progress(found, checkpoint):
        losses.append(replace(loss, format=planned[packed.weight.name]))
        yield packed


def _compared(job: Job, written: Written, name: str, rows: Rows) -> Comparison:
    """The checkpoint and what was made of it, decoded by somebody else's decoder, scored on `rows`."""
    base, candidate = Version("checkpoint", load), Version(name, job.container.open(written.path).load)
    (found,) = compare(job.model, base, [candidate], rows, job.settings.resources)
    return found.comparison


def _made(
    job: Job, calibration: Calibration | None, rows: Rows | None, comparison: Comparison | None
) -> Made:
    """What a card tells."""
    rounded_on = None if job.settings.effort == "fast" else rows
    measured = () if comparison is None else _lines(comparison)
    return Made(job.plan, calibration, rounded_on, job.settings.coupled, measured)


def _lines(found: Comparison) -> tuple[tuple[str, str], ...]:
    """What a card says of the comparison."""
    before, after = found.base_perplexity, found.perplexity
    return (
        ("scored", f"{found.tokens:,} tokens of {found.source}"),
        ("perplexity before", f"{before.value:.3f} ± {before.error:.3f}"),
        ("perplexity after", f"{after.value:.3f} ± {after.error:.3f}"),
        ("KL divergence, mean", f"{found.kl_mean.value:.5f} ± {found.kl_mean.error:.5f}"),
        ("same top token", f"{found.same_top:.2%}"),
    )


def _notes(job: Job) -> tuple[str, ...]:
    """What a person should know about this output, and could not guess from the tables."""
    dense = ["a dense model: there are no experts to treat one by one"] if not job.model.n_experts else []
    skipped = [f"left out: {count:,} tensors, {reason}" for reason, count in job.model.skipped.items()]
    return (*job.container.notes, *dense, *skipped)


@dataclass(frozen=True, slots=True)
class Texts:
    """Rows to calibrate on, to probe the plan with and to evaluate on; None where not needed."""

    calibration: Rows | None
    probes: Rows | None
    evaluation: Rows | None


def _texts(job: Job, calibrated: bool) -> Texts:
    """The rows that this conversion needs; probes and calibration share no row."""
    settings, checkpoint, bos = job.settings, job.model, leading(job.model)
    calib = probes = evaluation = None
    fast = settings.effort == "fast"
    if job.quantizes and not (fast and calibrated):
        documents = corpus.read(settings.calib, "calibration")
        if job.measures:
            tokens = settings.calib_tokens + Probing().rows * ROW
            calib, probes = split_probes(
                calibration_rows(checkpoint, documents, tokens, settings.seed, bos), Probing().rows
            )
        else:
            calib = calibration_rows(checkpoint, documents, settings.calib_tokens, settings.seed, bos)
    if settings.eval_tokens:
        documents = corpus.read(settings.eval, "evaluation")
        evaluation = token_rows(checkpoint, documents, settings.eval_tokens, settings.seed, bos)
    return Texts(calib, probes, evaluation)
