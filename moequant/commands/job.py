"""What is known of a conversion before any weight is read, and the types that measuring then chooses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from moequant import plan
from moequant.checkpoint import Checkpoint, Folder
from moequant.checkpoint.codecs import RELEASED
from moequant.commands.settings import Settings
from moequant.containers.base import Container
from moequant.containers.folders import inputs
from moequant.containers.folders.container import FolderContainer
from moequant.containers.folders.plan import KEPT
from moequant.containers.folders.schemes import find
from moequant.containers.gguf.container import GgufContainer
from moequant.containers.gguf.presets import facts
from moequant.containers.opened import open_model
from moequant.errors import PlanError, VerifyError
from moequant.files import part_names
from moequant.hub import Source
from moequant.hub.fetch import headers
from moequant.hub.stream import shelf_of
from moequant.plan.figures import Figures
from moequant.plan.folders import FolderMenu, budget_plan
from moequant.plan.measure import Probing, measure
from moequant.plan.menu import GgufMenu, Menu
from moequant.rounding.rounder import UNROUNDED
from moequant.runtimes.llama_cpp import acceptance
from moequant.runtimes.llama_cpp.binding import LlamaError
from moequant.text.corpus import Rows
from moequant.values import Calibration, Plan

LEFT_BY_HESSIANS = 0.78
"""Share of the plain search's KL divergence that rounding under Hessians leaves: seen on held-out
calibration text of a trained model, at llama.cpp's types for Q2_K_S."""

LEFT_COUPLED = 0.55
"""The same with coupled streams: 0.62 seen there, 0.48 on the demo model at Q4_K_M; between the two."""


@dataclass(frozen=True, slots=True)
class Job:
    """One output, and all that is known of it before any weight is read: headers, tokenizer, types, size.

    The jobs of a run share `model` and `container`; the `settings` of each name one size, and `label` tells
    them apart ("" of the only one).
    """

    model: Checkpoint
    container: Container
    plan: Plan
    settings: Settings
    label: str = ""

    def stage(self, name: str) -> str:
        """What a stage of this job alone is called."""
        return f"{name} {self.label}".rstrip()

    @property
    def size(self) -> int:
        """Bytes of what comes out, with the types of `plan`."""
        return self.container.size(self.plan)

    def parts(self, out: Path) -> dict[Path, int]:
        """The files of `out` and their bytes, with the types of `plan`; one folder counts as one."""
        sizes = self.container.parts(self.plan)
        return dict(zip(part_names(out, len(sizes)), sizes, strict=True))

    @property
    def quantizes(self) -> bool:
        """Whether any weight is rounded, so that calibration has something to say."""
        return any(name not in UNROUNDED for name in self.container.formats(self.plan).values())

    @property
    def keeps(self) -> bool:
        """Whether every number of the checkpoint is kept."""
        own = {weight.name: weight.origin.dtype for weight in self.container.checkpoint.weights}
        types = self.container.formats(self.plan)
        return all(name in ("F32", "I32", own[weight]) for weight, name in types.items())

    @property
    def measures(self) -> bool:
        """Whether types are still to be measured."""
        is_file, asked = isinstance(self.container, GgufContainer), self.settings
        is_open = asked.plan is None if is_file else asked.size is not None
        return is_open and self.quantizes and self.settings.effort != "fast"

    @property
    def scales_inputs(self) -> bool:
        """Whether a scheme, or one that may be chosen, scales inputs by the largest that calibration saw."""
        if isinstance(self.container, GgufContainer):
            return False
        asked = self.settings.schemes if self.measures else None
        allowed = [find(name.strip()) for name in (asked or "").split(",") if name]
        return inputs.scales(self.plan) or any(scheme.scales_inputs for scheme in allowed)

    @property
    def rounds_inputs(self) -> bool:
        """Whether vLLM rounds inputs too, as schemes of a folder say."""
        return isinstance(self.container, FolderContainer) and inputs.rounds(self.plan)

    @property
    def limit(self) -> int | None:
        """The largest file that may come out when types are still to be measured, None when they stay."""
        if not self.measures:
            return None
        if not isinstance(self.container, GgufContainer):
            return self.plan.budget
        return self.container.overhead(self.plan) + self.plan.budget


def open_job(model: Source | Folder, settings: Settings) -> Job:
    """The only job of `settings`; see `open_jobs`."""
    (job,) = open_jobs(model, settings)
    return job


def open_jobs(model: Source | Folder, settings: Settings) -> tuple[Job, ...]:
    """Read headers and tokenizer, choose every type that is known before measuring, for every size that
    `settings` name. Raises what those raise."""
    checkpoint = open_model(model if isinstance(model, Folder) else headers(model))
    if not settings.mtp:
        checkpoint = checkpoint.without_predictions()
    if settings.format != "gguf":
        folder = FolderContainer(checkpoint, settings.folder)
        return (Job(checkpoint, folder, _schemes(folder, settings), settings),)
    file = GgufContainer(checkpoint, settings.split)
    if settings.plan is not None:
        given = plan.read(settings.plan, file.checkpoint.weights, file.exported.own_names)
        return (Job(checkpoint, file, given, settings),)
    wanted = settings.each
    labels = [each.label for each in wanted] if len(wanted) > 1 else [""]
    return tuple(
        Job(checkpoint, file, _chosen(file, each), each, label)
        for each, label in zip(wanted, labels, strict=True)
    )


def check_runtime(job: Job) -> None:
    """VerifyError when llama.cpp, where it is here, refuses such a file: said before any work is done."""
    output = job.container
    if not (isinstance(output, GgufContainer) and job.settings.self_check):
        return
    try:
        acceptance.check(lambda header: output.outline(header, job.plan), str(job.model.source))
    except LlamaError as error:
        raise VerifyError(f"{error}; nothing was written (--no-self-check writes it all the same)") from None


def measured(
    jobs: Sequence[Job], calibration: Calibration, probes: Rows, figures: Figures | None = None
) -> plan.Sensitivities:
    """What each type would cost this model, measured once for all jobs; what is finished is kept in
    `figures`."""
    output, settings = jobs[0].container, jobs[0].settings
    probing = probing_of(output, settings)
    return measure(output.checkpoint, calibration, probes.ids, probing, settings.resources, figures)


def chosen(jobs: Sequence[Job], found: plan.Sensitivities) -> tuple[Job, ...]:
    """The same jobs with types chosen by what each costs."""
    output, settings = jobs[0].container, jobs[0].settings
    left = LEFT_COUPLED if settings.coupled else LEFT_BY_HESSIANS
    found = found.after({name: left for row in found.table.values() for name in row})
    return tuple(
        replace(job, plan=_planned(output, job.settings, found)) if job.measures else job for job in jobs
    )


def probing_of(output: Container, settings: Settings) -> Probing:
    """How types are measured for this output."""
    return Probing(gating=settings.gating, menu=menu_of(output, settings))


def menu_of(output: Container, settings: Settings) -> Menu:
    """What a plan of this output chooses from."""
    if isinstance(output, FolderContainer):
        return FolderMenu.of(output.checkpoint, output.settings)
    assert isinstance(output, GgufContainer)
    return GgufMenu(_pins(output, settings), settled=True)


def _planned(output: Container, settings: Settings, found: plan.Sensitivities) -> Plan:
    """The best plan of the size that was asked for, by what was measured."""
    if isinstance(output, FolderContainer):
        return _schemes(output, settings, found)
    assert isinstance(output, GgufContainer)
    return _chosen(output, settings, found)


def _schemes(
    folder: FolderContainer, settings: Settings, sensitivities: plan.Sensitivities | None = None
) -> Plan:
    """The one scheme of a folder, those of a plan, or the best of the size that was asked for."""
    if settings.size is None and settings.plan is None:
        return folder.plan
    menu = FolderMenu.of(folder.checkpoint, folder.settings)
    if settings.plan is not None:
        made = plan.read(settings.plan, folder.checkpoint.weights, made=menu.given)
        asked = f"{settings.plan}"
    else:
        made = budget_plan(menu, settings.budget, folder.size, sensitivities)
        asked = f"--size {settings.size}"
    if all(choice.format in KEPT for choice in made.choices):
        raise PlanError(
            f"{asked}: nothing would be quantized; the weights as they are take {folder.size(made):,} bytes, "
            "ask for less"
        )
    return made


def _chosen(file: GgufContainer, settings: Settings, sensitivities: plan.Sensitivities | None = None) -> Plan:
    """The best plan of the size that was asked for."""
    weights = file.checkpoint.weights
    bare = plan.plan_from_types(weights, {each.name: each.fixed_type or "F32" for each in weights})
    overhead = file.overhead(bare)
    pins = _pins(file, settings)
    return plan.make_plan(weights, settings.budget, facts(file.exported), sensitivities, overhead, pins)


def _pins(file: GgufContainer, settings: Settings) -> dict[str, str]:
    """The types that a person pinned."""
    return plan.pinned(settings.tensor_type, file.checkpoint.weights, file.exported.names)


HALVES = "of each row of text the encoder reads the first half; the decoder is scored on the rest"
"""What a figure of a model with an encoder means."""


def notes(job: Job) -> tuple[str, ...]:
    """What a person should know about this output, and could not guess from the tables."""
    dense = ["a dense model: there are no experts to treat one by one"] if not job.model.n_experts else []
    halves = [HALVES] if job.model.encodes else []
    left_out = job.container.checkpoint.skipped.items()
    skipped = [f"left out: {count:,} tensors, {reason}" for reason, count in left_out]
    at = job.model.revision
    source = [f"made from {job.model.repository} of the Hugging Face Hub, commit {at}"] if at else []
    shelf = shelf_of(job.model)
    away = (
        f"streamed: {shelf.fetched / 1e9:.3f} GB fetched; not compared with transformers" if shelf else None
    )
    known = (*job.container.notes, *job.model.notes, *_already_lost(job.model), *_larger(job))
    return (*known, *dense, *halves, *skipped, *source, *([away] if away else []))


def _larger(job: Job) -> tuple[str, ...]:
    """That an output is larger than what it is made of, where that is quantized: bytes bring nothing back."""
    stored = (each for weight in job.model.weights for each in weight.origin.stored)
    if job.size <= job.model.source_bytes or all(each.codec.name == "plain" for each in stored):
        return ()
    return (
        f"larger than the quantized weights that it is made from: {job.size:,} bytes instead of "
        f"{job.model.source_bytes:,}",
    )


def _already_lost(model: Checkpoint) -> tuple[str, ...]:
    """What a person should know who quantizes a quantized checkpoint. A GGUF file's own notes say it."""
    if model.gguf is not None:
        return ()
    stored = {each.name: each.codec.name for weight in model.weights for each in weight.origin.stored}
    kinds = Counter(kind for kind in stored.values() if kind not in RELEASED)
    if not kinds:
        return ()
    lossy = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())
    return (
        f"made from a checkpoint that is quantized already ({lossy} tensors): what that lost stays lost, and "
        "the comparison does not see it; convert the original where there is one",
    )
