"""One step of the rounding after another."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from gguf import GGUFReader

from benchmarks import llama, measure
from benchmarks.cases.rounding import PROBES
from benchmarks.cases.router import Fit, refit
from benchmarks.data import TINY, Beside, rows
from benchmarks.harness import Rows, case
from moequant import Settings, convert
from moequant.commands.convert import open_job
from moequant.containers.gguf.weights import GgufWeights
from moequant.forward.resources import Resources
from moequant.rounding.diagonal import Quantizer, pack_all
from moequant.rounding.feedback import Options
from moequant.rounding.layerwise import round_checkpoint
from moequant.rounding.rounder import FISHER_TOKENS, Rounding
from moequant.rounding.shrinkage import Mix, Trial
from moequant.statistics.calibrate import calibrate
from moequant.text import corpus
from moequant.values import Calibration

RAW = Trial(mixes=(Mix(1, 0, 0),))
"""Nothing but an expert's own Hessian, or the diagonal where that rounds better."""

STEPS: Mapping[str, Rounding | None] = {
    "plain": None,
    "feedback": Rounding(None, Options(rounds=0), trial=RAW),
    "shrinkage": Rounding(None, Options(rounds=0)),
    "descent": Rounding(None),
    "sequential": Rounding(),
    "two-sided": Rounding(fisher_tokens=FISHER_TOKENS),
    "best": Rounding.of("best"),
}
"""Each adds to the one before; `plain` is the search of every weight on its own, `sequential` the default."""


@dataclass(frozen=True)
class Ablation(Beside):
    """`steps` also has `refit`, routers fitted again in the file of the step before, and `free`, types chosen
    freely for its size."""

    tokens: int = 102_400
    types: tuple[str, ...] = ("Q2_K_S", "Q4_K_S")
    steps: tuple[str, ...] = (*STEPS, "refit", "free")


@case(
    "What each step of the rounding buys, one after another",
    Ablation(**TINY, types=("Q2_K_S",), steps=("plain", "refit")),
    ("llama.cpp",),
)
def ablation(o: Ablation) -> Rows:
    """KL divergence in llama.cpp and CPU time at llama.cpp's own types. The time of a step has the statistics
    pass in it, which all of them share here."""
    theirs = llama.Baselines.of(o)
    with tempfile.TemporaryDirectory() as name:
        work = Work(o, Path(name))
        judge = llama.Judge.of(llama.exact_file(o.model, work.folder), o.ids)
        calibration, counted = measure.cpu(work.statistics)
        for type_ in o.types:
            its, spent = theirs.type(type_), 0.0
            for step in o.steps:
                _, own = measure.cpu(partial(work.step, step, type_, calibration))
                spent = own + {"free": 0.0, "refit": spent}.get(step, counted)
                found = llama.beside(judge.comparison(work.path), its)
                size = {"bytes": work.path.stat().st_size, "CPU s": spent}
                yield {"types": type_, "step": step} | found | size


@dataclass(frozen=True)
class Work:
    """One file, made again and again."""

    options: Ablation
    folder: Path

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / "ours.gguf"

    @property
    def settings(self) -> Settings:
        """What all steps have in common."""
        return Settings(calib=self.options.calib, eval_tokens=0, effort="best", overwrite=True)

    def rows(self) -> corpus.Rows:
        """Those that calibrate."""
        return rows(self.options.model, self.options.calib, count=self.options.tokens // 512)

    def statistics(self) -> Calibration:
        """What every file's plain search needs."""
        return calibrate(llama.as_file(self.options.model).checkpoint, self.rows())

    def step(self, step: str, type_: str, calibration: Calibration) -> None:
        """Make the file, or change it."""
        o = self.options
        if step == "refit":
            self.fit_routers()
        elif step == "free":
            size, tokens = str(self.path.stat().st_size), o.tokens - PROBES
            convert(o.model, self.path, replace(self.settings, size=size, calib_tokens=tokens))
        else:
            self.round(llama.plan_of(o.model, type_, self.folder / "plan.json"), calibration, STEPS[step])

    def round(self, plan: Path, calibration: Calibration, rounding: Rounding | None) -> None:
        """A file of the plan's types, its weights rounded that way."""
        job = open_job(self.options.model, replace(self.settings, plan=plan))
        checkpoint, quantizer = job.container.checkpoint, Quantizer(calibration)
        types = job.container.formats(job.plan)
        if rounding is None:
            results = pack_all(checkpoint, types, quantizer)
        else:
            ids, pack = self.rows().ids, quantizer.pack
            results = round_checkpoint(checkpoint, ids, types, pack, rounding, Resources())
        job.container.write(self.path, job.plan, (packed for packed, _ in results))

    def fit_routers(self) -> None:
        """Put routers that 60 rows fit to the file's own layers into the file."""
        exported, ids = llama.as_file(self.options.model), self.rows().ids[:60]
        provider = GgufWeights(self.path, exported).as_cut
        found = refit(exported.checkpoint, provider, ids, Fit(), len(ids)).routers
        routers = {exported.names[name]: values for name, values in found.items()}
        reader = GGUFReader(self.path, "r+")
        for tensor in reader.tensors:
            if tensor.name in routers:
                tensor.data[:] = routers[tensor.name].numpy()
        reader.data.flush()
