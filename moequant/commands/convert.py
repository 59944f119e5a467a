"""The straight line: open, route, plan, quantize, pack, verify, report; one for every container.

Several sizes of a model go along it together: what does not depend on the size is done once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path

from moequant.checkpoint import Checkpoint, Folder, load
from moequant.commands.beside import write_beside, write_card, write_imatrix
from moequant.commands.compare import rounded_by_runtime
from moequant.commands.duration import forecast
from moequant.commands.finished import Finished, Holdings, Sharing, holdings
from moequant.commands.job import Job, check_runtime, chosen, measured, notes, open_job, open_jobs
from moequant.commands.journal import RunJournal, begun, digests, kept
from moequant.commands.outputs import CARD, card_path, check_targets, claimed, keeping, names
from moequant.commands.settings import Settings
from moequant.commands.statistics import all_sites, given_statistics
from moequant.commands.text import Texts, texts
from moequant.containers.base import Written
from moequant.containers.folders import inputs
from moequant.containers.folders.container import FolderContainer
from moequant.containers.gguf.container import GgufContainer
from moequant.containers.gguf.export import export
from moequant.errors import CheckpointError, MoequantError, OutputError, PlanError
from moequant.evaluate import Measured
from moequant.evaluate.activations import Rounded
from moequant.evaluate.open_source import open_source
from moequant.evaluate.self_check import Output, SelfChecks, computes_plainly
from moequant.evaluate.side_by_side import Version, compare
from moequant.files import atomic, atomic_folder, atomic_parts, part_names, sweep_scratch
from moequant.forward.memory import check_memory
from moequant.forward.model import empty_model
from moequant.hub import Source
from moequant.hub.fetch import complete, headers, is_here
from moequant.hub.stream import announce, shelf_of, streamed
from moequant.plan import Sensitivities
from moequant.progress import Forecast, Meter, resident_bytes
from moequant.ranks import ALONE
from moequant.report import card, conversion_page
from moequant.report.conversion import Conversion
from moequant.report.summary import How, Report
from moequant.rounding.diagonal import Quantizer, pack_all, progress
from moequant.rounding.layerwise import round_checkpoint
from moequant.rounding.parts import Parts
from moequant.rounding.results import Result
from moequant.rounding.rounder import Rounding
from moequant.statistics.calibrate import calibrate
from moequant.statistics.fisher import Needs, needs
from moequant.statistics.fisher import check_memory as fits
from moequant.statistics.journal import fingerprint
from moequant.text.corpus import Rows
from moequant.values import Calibration, ExpertLoss, Packed, Role

__all__ = ["Job", "Settings", "convert", "convert_all", "gradients", "open_job", "open_jobs", "planned"]

DEFAULT = Settings()


@dataclass(frozen=True, slots=True)
class Known:
    """What all outputs of a run share: the statistics, the texts, where it keeps what is finished, and what
    it was expected to take. `model` is the fingerprint of what is read; `held` is what those hold that are
    finished."""

    calibration: Calibration | None
    texts: Texts
    journal: RunJournal | None
    forecast: Forecast | None
    model: str
    held: Holdings = field(default_factory=dict)


def convert(model: Source, out: str | Path, settings: Settings = DEFAULT) -> Report:
    """Quantize `model`, a Hugging Face folder or a model of the Hub, into `out`, a GGUF file or a folder, and
    report what it cost.

    A model of the Hub is downloaded when its headers have shown that it converts. Raises a MoequantError with
    one clear line when something is wrong. What is not finished by then is removed, and `out` is as it was
    before.
    """
    if len(settings.each) > 1:
        raise PlanError(f"{len(settings.each)} sizes are named, one is made here; convert_all writes several")
    return convert_all(model, out, settings).reports[0]


def convert_all(model: Source, out: str | Path, settings: Settings = DEFAULT) -> Conversion:
    """`convert` to every size that `settings` name; the model is read, measured and compared once for all.

    `out` is a folder, or a name with `{type}` in it, see `outputs.names`. Each file has the bytes that it
    would have alone. Where one fails, those before it are complete and stay.
    """
    sweep_scratch()
    source = headers(model)
    outs = names(source.path, Path(out), settings)
    with (
        claimed(source, outs, settings) as finished,
        streamed(source, settings.stream) as source,
    ):
        return _convert(source, outs, settings, finished)


def planned(model: Source, out: Path, settings: Settings = DEFAULT) -> tuple[tuple[Job, Path], ...]:
    """What a conversion would write and where, by headers alone."""
    source = headers(model)
    return tuple(zip(open_jobs(source, settings), names(source.path, out, settings), strict=True))


def _convert(source: Folder, outs: Sequence[Path], settings: Settings, finished: Set[Path]) -> Conversion:
    meter, files = Meter(), digests(settings)
    with meter.stage("open"):
        jobs = open_jobs(source, settings)
        first = jobs[0]
        model = fingerprint(first.model)
        check_targets(jobs, outs, finished)
        check_runtime(first)
        checkpoint = first.container.checkpoint
        empty_model(checkpoint)  # every weight has its place in the model, before any is read
        if settings.imatrix_out is not None:
            export(first.model)  # says why not, where llama.cpp has no such model
        calibration = given_statistics(first.model, checkpoint, settings)
        if calibration is not None and any(job.scales_inputs for job in jobs):
            inputs.check(calibration)
        read = _texts(jobs, settings, calibration is not None)
        check_memory(checkpoint, models=2 if read.evaluation else 1 if read.calibration else 0)
        if read.calibration is not None and any(job.quantizes for job in jobs):
            gradients(checkpoint, settings)
    if not is_here(source):
        with meter.stage("download"):  # only now: whatever headers refuse is refused before
            jobs = open_jobs(complete(source), settings)
        first = jobs[0]
        model = fingerprint(first.model)
        checkpoint = first.container.checkpoint
    passes = _routes(first, read, calibration) + any(job.measures for job in jobs) + len(jobs)
    announce(first.model, passes + (read.evaluation is not None))
    journal = begun(jobs, outs, settings, read, files)
    with kept(journal):
        goes_on = journal is not None and journal.begun
        expected = None if goes_on else forecast(jobs, read, _routes(first, read, calibration))
        known = Known(calibration, read, journal, expected, model)
        return _made_all(jobs, outs, known, meter)


def _made_all(jobs: Sequence[Job], outs: Sequence[Path], known: Known, meter: Meter) -> Conversion:
    """All outputs, their comparison and what is written beside them, from what headers and texts say."""
    first, settings, read = jobs[0], jobs[0].settings, known.texts
    routes = _routes(first, read, known.calibration)
    if routes and read.calibration is not None:
        with meter.stage("route"):
            known = replace(known, calibration=_routed(first, read.calibration, known.journal))
    if known.calibration is not None and settings.imatrix_out is not None:
        write_imatrix(first, known.calibration, settings.imatrix_out, known.journal)
    if known.calibration is not None and read.probes is not None:
        with meter.stage("plan"):
            jobs = chosen(jobs, _sensitivities(jobs, known.calibration, read.probes, known.journal))
    done = _all_made(jobs, outs, known, meter)
    comparisons: Sequence[Measured | None] = [None] * len(done)
    if read.evaluation is not None:
        with meter.stage("compare"), keeping(outs):
            comparisons = _compared(done, read.evaluation)
    made = Conversion(
        tuple(
            _report(each, known, comparison, meter)
            for each, comparison in zip(done, comparisons, strict=True)
        )
    )
    if (path := card_path(outs, settings)) is not None:
        with keeping(outs):
            write_card(made, path, settings, known.journal)
    if (page := settings.html) is not None:
        with keeping(outs):
            write_beside(page, lambda: conversion_page.write(made, page), settings, known.journal)
    return made


def _all_made(jobs: Sequence[Job], outs: Sequence[Path], known: Known, meter: Meter) -> list[Finished]:
    """Every output, made or as a run that was killed made it."""
    done, checks = list[Finished](), SelfChecks(jobs[0].model, any(job.keeps for job in jobs))
    for number, (job, out) in enumerate(zip(jobs, outs, strict=True)):
        with keeping([each.written.path for each in done]):
            again = _again(job, out, number, known, meter)
            done.append(again or _made(job, out, number, known, checks, meter))
            if job is not jobs[-1] and not _under_hessians(job, known):
                known = replace(known, held={**holdings(done[-1]), **known.held})
    return done


def _routed(job: Job, rows: Rows, journal: RunJournal | None) -> Calibration:
    """The statistics pass, from where it stopped."""
    checkpoint, settings = job.container.checkpoint, job.settings
    watched = None if settings.imatrix_out is None else all_sites(job.model)
    if journal is None:
        return calibrate(checkpoint, rows, settings.resources, watched=watched)
    layers = journal.statistics(checkpoint, rows)
    found = calibrate(checkpoint, rows, settings.resources, journal=layers, watched=watched)
    layers.forget_states()
    return found


def _sensitivities(
    jobs: Sequence[Job], calibration: Calibration, probes: Rows, journal: RunJournal | None
) -> Sensitivities:
    """What types cost, measured once, from where it stopped."""
    if journal is None:
        return measured(jobs, calibration, probes)
    if (found := journal.sensitivities()) is None:
        found = measured(jobs, calibration, probes, journal.figures)
        journal.keep_sensitivities(found)
    journal.forget_figures()
    return found


def gradients(checkpoint: Checkpoint, settings: Settings) -> Needs | None:
    """What the gradients of effort best need, None at other efforts. ShortageError when memory is short."""
    tokens = min(Rounding.of(settings.effort).fisher_tokens, settings.calib_tokens)
    if not tokens:
        return None
    needed = needs(checkpoint, tokens, settings.device)
    fits(needed, settings.device)
    return needed


def _texts(jobs: Sequence[Job], settings: Settings, calibrated: bool) -> Texts:
    """The rows that these jobs need."""
    quantizes = any(job.quantizes for job in jobs)
    unused = calibrated and (settings.effort == "fast" or not quantizes)
    calibrates = (quantizes or settings.imatrix_out is not None) and not unused
    return texts(jobs[0].model, settings, calibrates, any(job.measures for job in jobs))


def _routes(job: Job, read: Texts, given: Calibration | None) -> bool:
    """Whether statistics are collected: there is text, and something is made of them. Integers of a folder
    are rounded under Hessians alone."""
    if read.calibration is None or given is not None:
        return False
    is_file = isinstance(job.container, GgufContainer)
    wanted = job.measures or job.scales_inputs or job.settings.imatrix_out is not None
    return is_file or wanted or job.settings.effort == "fast"


def _again(job: Job, out: Path, number: int, known: Known, meter: Meter) -> Finished | None:
    """The output as a run that was killed finished it; None where it did not, or where it may be replaced
    and is not what that wrote."""
    done = None if known.journal is None else known.journal.done(number, job, out)
    if known.journal is None or done is None:
        return None
    written, losses, checked = done
    try:
        with meter.stage(job.stage("verify")):
            job.container.verify(written, job.plan)
    except MoequantError:
        if not job.settings.overwrite:
            raise OutputError(f"{out}: exists already; give another name or --overwrite") from None
        return None
    known.journal.forget_parts(number)
    return Finished(job, out, written, losses, checked)


def _made(job: Job, out: Path, number: int, known: Known, checks: SelfChecks, meter: Meter) -> Finished:
    """Quantize, pack and verify one output; it has its name then."""
    losses: list[ExpertLoss] = []
    checked: str | None = None
    container, journal = job.container, known.journal
    with _place(job, out) as partial:
        with meter.stage(job.stage("quantize")):
            parts = None if journal is None else journal.parts(number, job)
            written = container.write(
                partial, job.plan, _rounded(job, known, parts, losses), known.calibration
            )
        with meter.stage(job.stage("verify")):
            container.verify(written, job.plan)
            if fingerprint(job.model) != known.model:  # what was read is of two models
                raise CheckpointError(
                    f"{job.model.source}: was changed while it was read; give the same command again"
                )
        if job.settings.self_check and shelf_of(job.model) is None:  # transformers reads a whole folder
            with meter.stage(job.stage("self-check")):
                left = None if job.settings.ram is None else max(0, job.settings.ram - resident_bytes())
                checked = checks.of(_output(job, written), left).note
        first = part_names(out, len(container.parts(job.plan)))[0]
        finished = Finished(job, out, replace(written, path=first), tuple(losses), checked)
        if container.is_folder:  # whole when it appears; what was compared is written into it later
            told = card.text(Conversion((_report(finished, known, None, meter),)), partial)
            card.write(told, partial / CARD)
        if journal is not None:
            journal.finish(number, job, written, losses, checked)
    if journal is not None:
        journal.forget_parts(number)
    return finished


def _place(job: Job, out: Path) -> AbstractContextManager[Path]:
    """Where the container writes, and what puts it in its place."""
    if job.container.is_folder:
        return atomic_folder(out)
    return atomic(out) if job.settings.split is None else atomic_parts(out)


def _rounded(job: Job, known: Known, parts: Parts | None, losses: list[ExpertLoss]) -> Iterator[Packed]:
    """Every weight that is packed, in the plan's order: what is finished, then the rest."""
    planned, given = {choice.weight: choice.format for choice in job.plan.choices}, set[str]()
    types = job.container.formats(job.plan)
    weights = [each for each in job.container.checkpoint.weights if each.name in types]
    if _under_hessians(job, known):  # beside which a plain search is nothing
        given |= {each.name for each in weights if each.role is Role.EMBEDDING or each.site is None}
    else:
        given |= {name for name, kind in types.items() if (name, kind) in known.held}
    nothing = frozenset[str]()
    found = _unfinished(job, known, None, nothing) if parts is None else _resumed(job, known, parts, given)
    for packed, loss in progress(found, weights, given):
        losses.append(replace(loss, format=planned[packed.weight.name]))
        yield packed


def _resumed(job: Job, known: Known, parts: Parts, given: set[str]) -> Iterator[Result]:
    """What is finished, which is added to what is `given`, then the rest."""
    finished = set[str]()
    for result in parts.results():
        finished.add(result[0].weight.name)
        given.add(result[0].weight.name)
        yield result
    if finished != parts.formats.keys():
        yield from _unfinished(job, known, parts, finished)


def _unfinished(job: Job, known: Known, parts: Parts | None, finished: Set[str]) -> Iterator[Result]:
    """What is not `finished`: by the plain search at effort fast, else under Hessians. It is kept in
    `parts`."""
    settings, checkpoint = job.settings, job.container.checkpoint
    types = job.container.formats(job.plan)
    how = known.calibration, settings.effort, settings.gating, settings.resources.device
    rows = known.texts.calibration
    if rows is None or not _under_hessians(job, known):
        found = pack_all(checkpoint, types, Sharing(*how, known.held), finished)
        return found if parts is None else parts.kept(found)
    rounding = Rounding.of(settings.effort, settings.coupled)
    plain = Quantizer(*how).pack
    return round_checkpoint(checkpoint, rows.ids, types, plain, rounding, settings.resources, parts)


def _under_hessians(job: Job, known: Known) -> bool:
    """Whether weights are rounded under Hessians, and not by the plain search."""
    return known.texts.calibration is not None and job.settings.effort != "fast" and job.quantizes


def _output(job: Job, written: Written) -> Output:
    """What was written, as the self-check looks at it."""
    load = job.container.open(written.path).load
    if job.container.is_folder:
        return Output(load, job.keeps)
    plain = computes_plainly(job.model, job.container.formats(job.plan).values())
    return Output(load, job.keeps, written.path, plain)


def _compared(done: Sequence[Finished], rows: Rows) -> tuple[Measured, ...]:
    """The checkpoint, and what was made of it decoded by somebody else's decoder, scored on `rows`."""
    job = done[0].job
    base = Version("checkpoint", load)
    candidates = [
        Version(each.written.path.name, each.job.container.open(each.written.path).load, _served(each))
        for each in done
    ]
    return compare(job.model, base, candidates, rows, replace(job.settings.resources, ranks=ALONE))


def _served(each: Finished) -> Rounded | None:
    """What vLLM does to inputs, where a folder's schemes say so: it is part of what the folder loses."""
    if not each.job.rounds_inputs:
        return None
    model = each.job.model
    return rounded_by_runtime(model, open_source(each.written.path, model))


def _of_inputs(job: Job, known: Known, measured: bool) -> tuple[str, ...]:
    """What a person should know of how inputs are rounded, and of the numbers that scale them."""
    found = ["scored with inputs rounded as vLLM rounds them"] if measured and job.rounds_inputs else []
    told = list[str | None]()
    if job.scales_inputs:
        told.append(inputs.note(job.container.checkpoint, job.plan, known.calibration))
    if isinstance(job.container, FolderContainer):
        told.append(inputs.elsewhere(job.plan, job.container.settings.layout))
    return (*found, *(each for each in told if each is not None))


def _report(finished: Finished, known: Known, found: Measured | None, meter: Meter) -> Report:
    """What is told of an output."""
    job, container = finished.job, finished.job.container
    rounded_on = known.texts.calibration if job.settings.effort != "fast" and job.quantizes else None
    is_folder = isinstance(container, FolderContainer)
    return Report(
        model=job.model.source,
        out=finished.written.path,
        file_bytes=finished.written.bytes,
        checkpoint=container.checkpoint,
        plan=job.plan,
        calibration=known.calibration,
        losses=finished.losses,
        measured=found,
        stages=tuple(meter.costs),
        forecast=known.forecast,
        notes=(*notes(job), *finished.written.notes, *_of_inputs(job, known, found is not None)),
        checked=finished.checked,
        parts=job.parts(finished.out),
        how=How(rounded_on, job.settings.coupled, job.settings.folder if is_folder else None),
    )
