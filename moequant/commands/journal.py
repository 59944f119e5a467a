"""What a conversion has finished, in a folder beside its output: the same command goes on from there.

`run.json` says which run it is. `route/` has the statistics of finished layers (`statistics.journal`), `plan`
what types cost, or `plan/` what is measured of that (`plan.figures`), a folder for each output its finished
parts (`rounding.parts`), and `done-N` of a finished output what was written. All but `run.json` have
checksums. The lock of the first output is the journal's too.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from pathlib import Path

import torch
import transformers

from moequant import __version__
from moequant.checkpoint import Checkpoint
from moequant.commands.job import Job, probing_of
from moequant.commands.journal_files import check, dismiss, remove
from moequant.commands.settings import Settings
from moequant.commands.text import Texts
from moequant.containers.base import Written
from moequant.containers.folders import side_files
from moequant.errors import (
    HubError,
    MoequantError,
    OutputError,
    RankError,
    ShortageError,
    UnreadableError,
    VerifyError,
    one_line,
)
from moequant.escape import size
from moequant.files import JOURNAL, atomic, is_scratch, part_names
from moequant.plan import Sensitivities
from moequant.plan.figures import Figures
from moequant.rounding.parts import Parts, loss_fields, loss_of, loss_tensors
from moequant.statistics import sealed
from moequant.statistics.journal import Journal, digest, fingerprint
from moequant.statistics.store import stacked
from moequant.text.corpus import Rows
from moequant.values import ExpertLoss

_LOG = logging.getLogger(__name__)

TOLD = 1_000_000_000
"""A journal of so many bytes is worth a line at the start."""

LATER = frozenset(
    {"ram", "stream", "overwrite", "fresh", "self_check", "eval", "eval_tokens", "card", "html", "calib"}
)
"""Settings that may change between a run and the one that goes on: they decide no byte of the output, or what
they name is compared itself."""

_INPUTS = ("stats", "imatrix", "plan")
"""Settings that name a file, which is compared by what is in it."""

ANOTHER_TIME = (OutputError, VerifyError, HubError, RankError, UnreadableError, ShortageError)
"""Errors that the same command may not meet again: disks get room and come back, the Hub answers, other
programs end, the self-check can be left out, and processes are not killed again."""

GOES_ON = "finished work is kept: give the same command again to continue"


def journal_of(outs: Sequence[Path]) -> Path:
    """Where a conversion to `outs` keeps what it has finished. OutputError for an output beside which there
    is no place."""
    first = outs[0] if outs[0].name not in ("", "..") else outs[0].resolve()
    if not first.name:
        raise OutputError(f"{outs[0]}: is a whole disk; give the name of a file or folder on it")
    return first.with_name(f"{first.name}{JOURNAL}")


def finished_by(folder: Path, outs: Sequence[Path]) -> frozenset[Path]:
    """Outputs that a run which was killed may have put in their places, as the journal in `folder` says."""
    done = {out for number, out in enumerate(outs) if (folder / f"done-{number}.safetensors").is_file()}
    return frozenset(done | set(_beside(folder)))


def _beside(folder: Path) -> list[Path]:
    try:
        return [Path(name) for name in json.loads((folder / "beside.json").read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError, RecursionError):
        return []


def digests(settings: Settings) -> dict[str, str]:
    """What tells the files that settings name from others; to be asked before they are read: a model may be
    downloaded between that and the journal. Those that cannot be read are left to their readers."""
    found = dict[str, str]()
    for name in _INPUTS:
        path: Path | None = getattr(settings, name)
        with suppress(OSError, ValueError):
            if path is not None and path.is_file():  # and no pipe, which can be read once
                found[name] = _digest(path)
    return found


def identity(
    jobs: Sequence[Job], outs: Sequence[Path], settings: Settings, read: Texts, files: Mapping[str, str]
) -> dict[str, str]:
    """What decides the bytes of a run, by the name that a person knows it under; `files` are `digests`."""
    told = {each.name: getattr(settings, each.name) for each in fields(settings) if each.name not in LATER}
    told |= files
    told["imatrix_out"] = told["imatrix_out"] is not None
    options = {f"--{name.replace('_', '-')}": _shown(value) for name, value in told.items()}
    rows = {"text for calibration": read.calibration, "text for the plan": read.probes}
    return {
        **options,
        "names of outputs": json.dumps([out.name for out in outs]),
        "version of moequant": __version__,
        "version of torch": torch.__version__,
        "version of transformers": transformers.__version__,
        "model": fingerprint(jobs[0].container.checkpoint),
        **{name: "none" if each is None else digest(each) for name, each in rows.items()},
    }


def _shown(value: object) -> str:
    return "the default" if value is None or value == () else str(value)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


class RunJournal:
    """The journal of one conversion; see the module."""

    def __init__(self, folder: Path, run: Mapping[str, str]) -> None:
        """Open or begin it. OutputError when the folder belongs to another run, or is not a journal."""
        self.folder, self.run = folder, dict(run)
        self.name = hashlib.sha256(json.dumps(self.run).encode()).hexdigest()[:16]
        self.again = f"give --fresh to begin again, or delete {folder}"
        check(folder)
        try:
            if (folder / "run.json").exists():
                self._check_run()
                return
            if self.begun:  # by a run that nothing names
                raise OutputError(f"{folder}: is damaged (no run.json); {self.again}")
            remove(folder)  # a run that died before it had begun
            self._begin()
        except OSError as error:
            raise OutputError(f"{folder}: cannot keep the state of this run ({error})") from None

    def _begin(self) -> None:
        self.folder.mkdir()
        try:
            with atomic(self.folder / "run.json") as partial:
                partial.write_text(json.dumps(self.run, indent=1), encoding="utf-8")
        except (OSError, OutputError):
            remove(self.folder)
            raise

    def _check_run(self) -> None:
        try:
            was = json.loads((self.folder / "run.json").read_text(encoding="utf-8"))
            keys = sorted(was.keys() ^ self.run.keys()) or [k for k in self.run if was[k] != self.run[k]]
        except (ValueError, AttributeError, RecursionError):
            raise OutputError(f"{self.folder}: is damaged; {self.again}") from None
        for key in keys[:1]:
            what = f"another {key}"
            if key.startswith("--") and key.strip("-").replace("-", "_") not in _INPUTS:
                what = f"{key} {one_line(was.get(key))}, now {one_line(self.run.get(key))}"
            raise OutputError(
                f"{self.folder}: left by a run with {what}; repeat that command to continue it, or give "
                "--fresh to begin again"
            )

    @property
    def begun(self) -> bool:
        """Whether anything is finished, so that there is something to go on from; true where nobody may
        look."""
        try:
            next(self.folder.iterdir(), None)  # where it may not look, glob finds nothing and says nothing
        except OSError:
            return os.path.lexists(self.folder)
        measured = ("plan.safetensors", "plan/errors-*", "plan/*/reached*")
        finished = ("route/layer-*", *measured, "*/part-*", "*/piece-*", "done-*")
        return any(True for pattern in finished for _ in self.folder.glob(pattern))

    def statistics(self, checkpoint: Checkpoint, rows: Rows) -> Journal:
        """The journal of the statistics pass."""
        return Journal(self.folder / "route", checkpoint, rows)

    def sensitivities(self) -> Sensitivities | None:
        """What types cost, once it was measured. OutputError when it is damaged."""
        path = self.folder / "plan.safetensors"
        if not path.exists():
            return None
        try:
            meta, _ = sealed.opened(path)
            if meta["run"] != self.name:
                raise ValueError("of another run")
            return Sensitivities(**json.loads(meta["sensitivities"]))
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged(path, error) from None

    @property
    def figures(self) -> Figures:
        """What is finished of measuring it."""
        return Figures(self.folder / "plan", self.name, self.again)

    def forget_figures(self) -> None:
        """It is measured: what that was made of is needed no more."""
        remove(self.folder / "plan", self.folder)

    def keep_sensitivities(self, found: Sensitivities) -> None:
        """They are measured."""
        # As text: tables keep their order, in which sums are made.
        meta = {"run": self.name, "sensitivities": json.dumps(asdict(found))}
        sealed.write(self.folder / "plan.safetensors", meta, {})

    def parts(self, number: int, job: Job) -> Parts:
        """What is finished of an output."""
        checkpoint, types = job.container.checkpoint, job.container.formats(job.plan)
        return Parts(self.folder / str(number), checkpoint.weights, types, self.name, self.again)

    def finish(
        self, number: int, job: Job, written: Written, losses: Sequence[ExpertLoss], checked: str | None
    ) -> None:
        """An output is written and verified; it gets its name now."""
        meta = {
            "run": self.name,
            "output": number,
            "bytes": written.bytes,
            "checksums": dict(written.checksums),
            "notes": written.notes,
            "checked": checked,
            "beside": side_files.digest(job.model.path),
            "losses": [loss_fields(loss) for loss in losses],
        }
        tensors = [loss_tensors(loss, str(at)) for at, loss in enumerate(losses)]
        every = {name: value for each in tensors for name, value in each.items()}
        # A run that died before the output had its name has left one.
        sealed.write(self._done(number), meta, every, overwrite=True)

    def forget_parts(self, number: int) -> None:
        """The output has its name: what it was made of is needed no more."""
        remove(self.folder / str(number), self.folder)

    def done(
        self, number: int, job: Job, out: Path
    ) -> tuple[Written, tuple[ExpertLoss, ...], str | None] | None:
        """What was written of a finished output, what was lost, and what its self-check said; None when it is
        not finished. OutputError when the record is damaged."""
        path = self._done(number)
        first = part_names(out, len(job.container.parts(job.plan)))[0]
        if not path.exists() or not first.exists():
            return None
        weights = {weight.name: weight for weight in job.container.checkpoint.weights}
        try:
            meta, tensors = sealed.opened(path)
            if (meta["run"], meta["output"]) != (self.name, number):
                raise ValueError("of another output or another run")
            losses = tuple(
                loss_of(weights[each["weight"]], each, tensors, str(at))
                for at, each in enumerate(meta["losses"])
            )
            checksums = {k: int(v) for k, v in meta["checksums"].items()}
            if meta["beside"] != side_files.digest(job.model.path):
                raise self._changed(out, job)
            written = Written(first, int(meta["bytes"]), checksums, tuple(meta["notes"]))
            return written, losses, meta["checked"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._damaged(path, error) from None

    def announced(self, path: Path) -> bool:
        """Whether a run before this one had begun to give that file its name."""
        return path in _beside(self.folder)

    def announce(self, path: Path) -> None:
        """A file that is written beside the outputs gets its name next."""
        names = sorted({str(each) for each in (*_beside(self.folder), path)})
        with atomic(self.folder / "beside.json", overwrite=True) as partial:
            partial.write_text(json.dumps(names), encoding="utf-8")

    def _done(self, number: int) -> Path:
        return self.folder / f"done-{number}.safetensors"

    def _changed(self, out: Path, job: Job) -> OutputError:
        return OutputError(
            f"{job.model.path}: its tokenizer, template, settings or README.md have changed since {out} was "
            f"made of them; put them back, or {self.again}"
        )

    def _damaged(self, path: Path, error: Exception) -> OutputError:
        return OutputError(f"{path}: cannot be continued from ({error}); {self.again}")


def begun(
    jobs: Sequence[Job], outs: Sequence[Path], settings: Settings, read: Texts, files: Mapping[str, str]
) -> RunJournal | None:
    """The journal of this run, from what a killed one left or new; `files` are `digests`. None where
    the disk has no room for one beside the outputs, and for outputs in a temporary folder."""
    folder = journal_of(outs)
    if is_scratch(folder):
        return None
    run = identity(jobs, outs, settings, read, files)
    if settings.fresh:  # only now, when nothing is left that would refuse this run
        dismiss(folder)
    if os.path.lexists(folder):
        found = RunJournal(folder, run)
        if found.begun:
            _LOG.info("%s: continues after the work that is finished there", folder)
        return found
    needed = journal_bytes(jobs, read)
    if shutil.disk_usage(folder.parent).free < sum(job.size for job in jobs) + needed:
        _LOG.warning(
            "%s: no room for %s beside the output: a killed run could not continue, and begins again",
            folder, size(needed),
        )  # fmt: skip
        return None
    if needed >= TOLD:
        _LOG.info(
            "%s: takes up to %.1f GB until the run ends, so that a killed run can continue",
            folder,
            needed / 1e9,
        )
    return RunJournal(folder, run)


def journal_bytes(jobs: Sequence[Job], read: Texts) -> int:
    """What a journal takes at most: statistics, and either what measuring takes, or, later, one output's
    weights, those of one layer twice, and hidden states of two streams in front of two layers."""
    checkpoint = jobs[0].container.checkpoint
    tokens = 0 if read.calibration is None else read.calibration.ids.numel()
    states = 16 * tokens * checkpoint.shape.hidden * checkpoint.shape.streams
    sites = {weight.site.name: stacked(weight) * weight.n_in for weight in checkpoint.weights if weight.site}
    layers = Counter({weight.layer: 0 for weight in checkpoint.weights})
    for weight in checkpoint.weights:
        layers[weight.layer] += weight.numel
    twice = 1 + max(layers.values()) / layers.total()
    rounding = round(twice * max(job.size for job in jobs)) + states
    return max(rounding, _measuring_bytes(jobs, read)) + 16 * sum(sites.values())


def _measuring_bytes(jobs: Sequence[Job], read: Texts) -> int:
    """What is kept at most while types are measured."""
    first = jobs[0]
    if read.probes is None or not any(job.measures for job in jobs):
        return 0
    probing = probing_of(first.container, first.settings)
    return probing.kept_bytes(first.container.checkpoint, read.probes.ids)


@contextmanager
def kept(journal: RunJournal | None) -> Iterator[None]:
    """Remove the journal when the block ends well. After an error keep it, and have the error say so; but
    remove it when nothing is finished yet, or when the same command would meet the same error again."""
    if journal is None:
        yield
        return
    try:
        yield
    except BaseException as error:
        repeats = isinstance(error, MoequantError) and not isinstance(error, ANOTHER_TIME)
        if not journal.begun or repeats:
            dismiss(journal.folder)
        elif isinstance(error, ANOTHER_TIME) and "to begin again" not in str(error):
            raise type(error)(f"{error} ({GOES_ON})") from error
        elif not isinstance(error, MoequantError):  # signals, lack of memory, errors of the system
            error.add_note(GOES_ON)
        raise
    dismiss(journal.folder)
