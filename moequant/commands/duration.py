"""What a conversion will take: its work, counted from headers, at the speed that this machine has now.

Stage by stage three kinds of work are counted: floating-point operations of matrix products, numbers that are
handled one by one, decoded, squared or searched for a scale, and calls that take as long whatever they work
on. The three speeds are measured in turn, for about a second. The constants say how often a stage handles a
number. They were fitted to CPU seconds of conversions of models of six shapes, 9 to 128 million weights, each
at the speed that the machine had then; `benchmarks/results/duration.md` holds five
conversions, one of a model that was new, against the constants of its commit; some are newer.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from moequant import formats
from moequant.checkpoint import Checkpoint
from moequant.commands.job import Job, probing_of
from moequant.commands.journal import journal_bytes
from moequant.commands.pace import TYPICAL, Search, Work, decoding, searches, speed
from moequant.commands.text import Texts
from moequant.escape import shown
from moequant.evaluate.divergence import LOGITS
from moequant.evaluate.self_check import ROWS, TOKENS, WEIGHT
from moequant.formats import Effort, engine
from moequant.forward.memory import held_numbers, rounding_work, usable_bytes, working_bytes
from moequant.plan import vocabulary
from moequant.plan.measure import Probing
from moequant.progress import Forecast, resident_bytes
from moequant.rounding.layerwise import BATCHES
from moequant.rounding.rounder import UNROUNDED, Rounding
from moequant.statistics.fisher import BATCH_TOKENS, needs
from moequant.text.corpus import Rows
from moequant.values import Role, Weight

_LOG = logging.getLogger(__name__)

LOADED = 3
"""Times that a stored number is handled until a layer can multiply with it."""

READ = {"route": 1, "plan": 2, "quantize": 1, "self-check": 1, "compare": 1}
"""How often a stage reads the whole model."""

SQUARED = 7
"""Times that a number which a weight is fed is handled by the statistics."""

CALL = 140
"""Calls of a matrix in a batch: it is found, its tokens are gathered, multiplied and put back."""

SEARCHED, COMPILED = 20.0, 1 / 7
"""Times that the plain search for a usual type handles a weight; the share that is left where torch compiles
it. Where it counts the search is measured, type by type."""

COMPILING = 700_000
"""Calls until an encoder that torch compiled is loaded; the first time on a machine it takes longer."""

DISTORTED = 12
"""Times that a weight is handled until it has the error of a probe."""

SAMPLED = 100
"""Times that a sampled weight is handled in one type, small as samples are."""

ROUNDED = 50
"""Times that rounding under a Hessian handles a weight."""

SEARCHES = (1.2, 2.4)
"""How often a weight is searched for, alone and under a Hessian; its error is counted in."""

TRIALS, TRIED = (7, 28), 4_500
"""Trial roundings of what is fed to a matrix, and to experts, of which several classes are tried; calls of
one."""

FOLLOWED = 10
"""Operations for every pair of a weight and a column of its row: targets, feedback, descent, errors."""

LONGER = 3.0
"""How often effort best does what default does under a Hessian: six rounds of descent for two, and two more
under both sides."""

SWEPT = 20 * 30
"""Calls for every column of a matrix at effort best, beyond those of default: twenty sweeps more, of which
sixteen are of an eighth of the rows each. This and `LONGER` are a compromise between two conversions, of one
layer with Q4_K_M and of eight with 4-bit integers, which took 1.12 and 0.82 of what is counted."""

FACTORED = 26
"""Operations for every cube of a Hessian's side: it is mixed, factorised, inverted, slower than products."""

COMPARED = 16
"""Times that a weight is handled to be decoded and compared."""

SCORED = 22
"""Times that a logit is handled to be scored."""

VERIFIED = 2
"""Times that a written weight is handled to be verified."""

CHECKED, UNPACKED = 13, 6
"""Times that the self-check handles a weight: transformers, we and whoever decodes the output each load it;
more where that is a GGUF file."""

HELD, STARTED = 50, 50_000
"""Calls of the self-check for each matrix; those of loading transformers' own model, and of llama.cpp."""

PARALLEL = 0.9
"""Of the cores, those that are busy while a stage runs."""

STREAMS = 7
"""Hidden states, and what is as wide, of both versions at once: in front of a layer and behind it, what
experts are fed, what they give."""

LOGITS_HELD = 12
"""Sets of logits, at most `LOGITS` of them each, that a comparison holds at once, on all threads."""

LIBRARIES = 600_000_000
"""Bytes that libraries come to hold while a conversion runs, beside what they hold at its start."""

SHORT = 20.0
"""CPU seconds of a conversion of which nobody wants to know before."""

TOLD = 120.0
"""Seconds from which a conversion says beforehand what it will take."""


def forecast(jobs: Sequence[Job], read: Texts, routes: bool) -> Forecast | None:
    """What a conversion will take, and says so where it is long. None where that is not known, on a GPU;
    and where it is short."""
    settings = jobs[0].settings
    if settings.device != "cpu":
        return None
    work = counted(jobs, read, routes, lambda name: SEARCHED)
    if sum(map(TYPICAL.seconds, work.values())) < SHORT:
        return None
    now = speed()
    decode = decoding(jobs[0].container.checkpoint, now)
    work = counted(jobs, read, routes, searches(now, settings.effort), decode)
    stages = {name: now.seconds(each) for name, each in work.items()}
    used = sum(stages.values())
    found = Forecast(used / (now.cores * PARALLEL), used, stages, _memory(jobs, read), _disk(jobs, read))
    if found.seconds >= TOLD:
        _LOG.info("%s: will take %s", shown(jobs[0].model.source), found)
    return found


def _memory(jobs: Sequence[Job], read: Texts) -> int:
    """Bytes that this process comes to hold, and what the stage that needs most adds: two versions of a layer
    or of the ends with hidden states, or what rounding works with."""
    settings, checkpoint = jobs[0].settings, jobs[0].container.checkpoint
    versions = working_bytes(checkpoint, 2, usable_bytes(settings.ram)) + _states(jobs[0], read, 1)
    if read.evaluation is not None:
        versions += LOGITS_HELD * 4 * min(LOGITS, read.evaluation.tokens * checkpoint.shape.vocab)
    rounding = 0 if settings.effort == "fast" else _rounding(jobs[0], read)
    felt = 0 if read.calibration is None else _felt(settings.effort, read.calibration.tokens)
    gradients = needs(checkpoint, felt).bytes if felt else 0
    return resident_bytes() + LIBRARIES + max(versions, rounding, gradients)


def _felt(effort: Effort, tokens: int) -> int:
    """Of the tokens for calibration, those whose gradients are taken."""
    return min(tokens, Rounding.of(effort).fisher_tokens)


def _states(job: Job, read: Texts, count: int) -> int:
    """Bytes of so many sets of hidden states, which go to disk above half of --ram."""
    tokens, shape = 0 if read.calibration is None else read.calibration.tokens, job.container.checkpoint.shape
    ram, states = job.settings.ram, 4 * tokens * shape.hidden * shape.streams * count
    return states if ram is None else min(states, ram // 2)


def _rounding(job: Job, read: Texts) -> int:
    """Bytes of Grams of experts, as many again to round them under, attention that is kept, hidden states of
    both versions, and what else there is of a layer, or the head."""
    checkpoint, most = job.container.checkpoint, rounding_work(job.settings.ram)
    tokens = 0 if read.calibration is None else read.calibration.tokens
    wide = [weight for weight in checkpoint.weights if weight.site is not None and weight.runs]
    grams = max((4 * w.matrices * w.n_in * (5 * w.n_in + w.shape[-2]) for w in wide), default=0)
    mixed = max((8 * tokens * weight.n_in for weight in wide if not weight.is_expert), default=0)
    layers: dict[int | None, int] = {}
    for weight in checkpoint.weights:
        if not weight.is_expert:
            numbers = held_numbers(weight)
            own = 4 * numbers if weight.layer is None else 8 * numbers + layers.get(weight.layer, 0)
            layers[weight.layer] = max(own, layers.get(weight.layer, 0))
    return (
        _states(job, read, STREAMS)
        + 2 * min(most, grams)
        + min(most, mixed)
        + max(layers.values(), default=0)
    )


def _disk(jobs: Sequence[Job], read: Texts) -> int:
    """Bytes of the outputs and of the journal, which has one of them again."""
    return sum(job.size for job in jobs) + journal_bytes(jobs, read)


@dataclass(frozen=True, slots=True)
class Model:
    """What a token costs a model in operations: of all `layers`, of those outside of routed experts, and of
    the head; `fed` are the numbers that the sites of its `matrices` are fed, `calls` the products."""

    checkpoint: Checkpoint
    matrices: tuple[Weight, ...]
    passed: float
    outside: float
    head: float
    fed: float
    calls: int

    @classmethod
    def of(cls, checkpoint: Checkpoint, row: int) -> Model:
        """Counted from headers, for rows of so many tokens."""
        shape = checkpoint.shape
        run = tuple(w for w in checkpoint.weights if w.runs and len(w.shape) > 1 and w.layer is not None)
        run = tuple(weight for weight in run if not weight.is_table)
        outside = 4.0 * row * shape.heads * shape.head_dim * shape.layers
        outside += sum(2 * weight.numel for weight in run if not weight.is_expert)
        experts = sum(2 * weight.numel * _met(checkpoint, weight) for weight in run if weight.is_expert)
        sites = {weight.site.name: weight for weight in run if weight.site is not None}.values()
        fed = sum(w.matrices * w.n_in * _met(checkpoint, w) for w in sites)
        calls = sum(weight.matrices if weight.is_expert else 1 for weight in run)
        head = 2 * shape.vocab * shape.hidden
        return cls(checkpoint, run, outside + experts, outside, head, fed, calls)

    @property
    def stored(self) -> int:
        """Numbers of the layers' matrices."""
        return sum(weight.numel for weight in self.matrices)

    @property
    def numel(self) -> int:
        """Numbers of all weights."""
        return sum(weight.numel for weight in self.checkpoint.weights)

    @property
    def seen(self) -> int:
        """Numbers of the weights that a pass reads."""
        return sum(map(held_numbers, self.checkpoint.weights))

    def passing(self, tokens: float, batch: float) -> Work:
        """Tokens through all layers."""
        return Work(tokens * self.passed, 0, CALL * self.calls * max(1.0, tokens / batch))


def _met(checkpoint: Checkpoint, weight: Weight) -> float:
    """Of the matrices of a weight, the share that a token meets."""
    return checkpoint.shape.experts_used / weight.matrices if weight.is_expert else 1.0


def counted(
    jobs: Sequence[Job], read: Texts, routes: bool, search: Search, decode: float = 0.0
) -> dict[str, Work]:
    """The work of every stage, by the name of the stage; `routes` says whether statistics are collected,
    `decode` how often a stored number is handled to be decoded."""
    first, found = jobs[0], dict[str, Work]()
    rows = read.calibration or read.evaluation
    model = Model.of(first.container.checkpoint, 1 if rows is None else rows.ids.shape[1])
    batch = first.settings.resources.batch_tokens
    if routes and read.calibration is not None:
        found["route"] = _route(model, read.calibration.tokens, batch)
    if read.probes is not None and any(job.measures for job in jobs):
        found["plan"] = _plan(model, read.probes, probing_of(first.container, first.settings))
    searched = set[tuple[str, str]]()
    for job in jobs:
        plain = read.calibration is None or job.settings.effort == "fast" or not job.quantizes
        types = job.container.formats(job.plan)
        tokens = 0 if plain or read.calibration is None else read.calibration.tokens
        if plain and not job.container.is_folder:  # the same weight in the same format is searched once
            types, searched = dict(types.items() - searched), searched | types.items()
        found[job.stage("quantize")] = _quantize(model, types, tokens, search, job.settings.effort)
        found[job.stage("verify")] = Work(numbers=VERIFIED * model.numel)
        if job.settings.self_check:
            found[job.stage("self-check")] = _self_check(model, job, job is first)
    if read.evaluation is not None:
        found["compare"] = _compare(model, read.evaluation.tokens, 1 + len(jobs), batch)
    more = {name: READ.get(name.partition(" ")[0], 0) * decode * model.seen for name in found}
    return {name: work + Work(numbers=more[name]) for name, work in found.items()}


def _self_check(model: Model, job: Job, first: bool) -> Work:
    """A few tokens through transformers' model and ours, once for all outputs, what was written, and
    llama.cpp's of a file; of a model that does not fit memory, through the first layers of the others."""
    free = usable_bytes(job.settings.ram)
    share = 1.0 if free is None else min(1.0, free / (WEIGHT * model.numel))
    runs, loads = not job.container.is_folder and share == 1, 3 if first else 1
    handled = CHECKED * loads / 3 + (0 if job.container.is_folder else UNPACKED)
    return Work(
        share * (loads + runs) * ROWS * TOKENS * (model.passed + model.head),
        share * handled * model.numel,
        share * HELD * loads / 3 * model.calls + STARTED * (first + runs),
    )


def _route(model: Model, tokens: int, batch: int) -> Work:
    return model.passing(tokens, batch) + Work(numbers=LOADED * model.stored + SQUARED * tokens * model.fed)


def _plan(model: Model, probes: Rows, probing: Probing) -> Work:
    """Errors of samples in every type; then every group of weights in a version of its own, which crosses the
    layers from the first that it changes, and two whole plans."""
    checkpoint, menu = model.checkpoint, probing.menu
    running = tuple(weight for weight in checkpoint.weights if weight.runs)
    groups = probing.groups(running)
    row = probes.ids.shape[1]
    tokens = row * probing.scored(len(groups), probes.ids)
    layers = checkpoint.shape.layers
    crossed = 4 * layers + sum(
        layers - (group[0].layer or 0) for group in groups if group[0].role is not Role.OUTPUT
    )
    passes = model.passing(tokens * crossed / layers, row)
    samples = 0
    for weight in running:
        if (others := len(menu.measured(weight)) - 1) > 0:
            experts, rows = probing.sampled(weight)
            samples += others * experts * rows * weight.n_in
    # The model itself, beside the groups and beside the plans; of versions some tokens of the vocabulary.
    vocab = checkpoint.shape.vocab
    heads = tokens / 2 * (2 + (len(groups) + 2) * min(1.0, vocabulary.TOKENS / vocab))
    head = Work(heads * model.head, SCORED * heads * vocab)
    changed = 3 * DISTORTED * sum(held_numbers(weight) for group in groups for weight in group)
    return passes + head + Work(numbers=SAMPLED * samples + changed + 2 * LOADED * model.stored)


def _searched(weight: Weight, name: str, times: float) -> Work:
    """The plain search for a weight in a format, handled so often while torch does not compile it."""
    return Work(numbers=weight.numel * times * (COMPILED if _compiled(weight, name) else 1))


def _compiled(weight: Weight, name: str) -> bool:
    """Whether torch compiles the search for a weight in a format."""
    return weight.numel >= engine.COMPILE_FROM and not formats.get(name).loops


def _gradients(model: Model, tokens: int) -> Work:
    """Tokens forward and back through the whole model, which is loaded, and the Grams of what comes back."""
    grams = 0.0
    for weight in model.matrices:
        if weight.site is not None:
            grams += 2 * weight.matrices * _met(model.checkpoint, weight) * weight.shape[-2] ** 2
    there_and_back = model.passing(2 * tokens, BATCH_TOKENS) + Work(tokens * (grams + 2 * model.head))
    return there_and_back + Work(
        numbers=LOADED * model.numel + SCORED * tokens * model.checkpoint.shape.vocab
    )


def _quantize(model: Model, types: dict[str, str], tokens: int, search: Search, effort: Effort) -> Work:
    """The plain search; or, with `tokens`, both streams, their Grams and what is done under Hessians."""
    found, compiled, sites = Work(), set[str](), dict[str, Weight]()
    times, felt = (LONGER if effort == "best" else 1.0), _felt(effort, tokens)
    if felt:
        found += _gradients(model, felt)
    for weight in model.checkpoint.weights:
        name = types.get(weight.name)
        if name is None or name in UNROUNDED:
            found += Work(numbers=LOADED * weight.numel)
            continue
        compiled |= {name} if _compiled(weight, name) else set()
        if not tokens or weight.site is None or not weight.runs:
            found += _searched(weight, name, SEARCHES[0] * search(name))
            continue
        sites[weight.site.name] = weight
        found += Work(times * FOLLOWED * weight.numel * weight.n_in, times * ROUNDED * weight.numel)
        found += Work(calls=SWEPT * weight.n_in * (effort == "best"))
        found += _searched(weight, name, SEARCHES[1] * search(name))
        if weight.adds:
            met = tokens * weight.matrices * _met(model.checkpoint, weight)
            found += Work(2 * met * weight.n_in * model.checkpoint.shape.hidden)
    for weight in sites.values():
        met = tokens * weight.matrices * _met(model.checkpoint, weight)
        found += Work(4 * met * weight.n_in**2 + FACTORED * weight.matrices * weight.n_in**3)
        found += Work(calls=TRIED * TRIALS[weight.is_expert])
    found += Work(calls=COMPILING * len(compiled) * (2 if tokens else 1))
    if not tokens:
        return found
    both = model.passing(2 * tokens, tokens / BATCHES)
    return found + both + Work(2 * tokens * model.outside)


def _compare(model: Model, tokens: int, versions: int, batch: int) -> Work:
    """The original and the outputs; the second half of every row is scored."""
    passes = model.passing(versions * tokens, batch)
    logits = versions * tokens / 2
    scored = Work(2 * logits * model.head, SCORED * logits * model.checkpoint.shape.vocab)
    return passes + scored + Work(numbers=COMPARED * versions * model.seen)
