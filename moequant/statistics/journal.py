"""What a routing pass has finished, on disk, so that a killed run goes on where it stopped.

One folder a run: `run.json` says which run it is, `layer-NNNN.safetensors` holds the
statistics of a finished layer, `hidden-NNNN.f32` the hidden states in front of a layer, all with
checksums. A layer counts as finished when its statistics are there under their final name; the hidden
states that it was fed are deleted only after that, and those that it gives are on the disk before.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from moequant import __version__
from moequant.checkpoint import Checkpoint
from moequant.errors import CorpusError, OutputError
from moequant.files import atomic
from moequant.statistics import store
from moequant.text.corpus import Rows
from moequant.values import Calibration

_FILES = re.compile(r"run\.json|layer-\d{4,}\.safetensors|hidden-\d{4,}\.f32|\..+\.moequant-.+")
"""Names in a run's folder, and of what a killed run leaves beside them."""

_RUNS = re.compile("[0-9a-f]{16}")


def check_journals(folder: Path) -> None:
    """OutputError unless `folder` may hold the folders of runs: it is absent, or holds nothing else."""
    _check_kind(folder)
    if folder.is_dir():
        for run in folder.iterdir():
            if not _RUNS.fullmatch(run.name):
                raise _foreign(run)
            _check(run)


def _check(run: Path) -> None:
    """OutputError unless `run` is absent or a folder in which everything has a name that a run gives."""
    _check_kind(run)
    if run.is_dir():
        for file in run.iterdir():
            if file.is_symlink() or not file.is_file() or not _FILES.fullmatch(file.name):
                raise _foreign(file)


def _check_kind(folder: Path) -> None:
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise _foreign(folder)


def _foreign(path: Path) -> OutputError:
    return OutputError(f"{path}: is not of a journal and is kept; move it away, or give another --out")


class Journal:
    """The folder of one run; see the module."""

    def __init__(self, folder: Path, checkpoint: Checkpoint, rows: Rows) -> None:
        """Open or begin it. OutputError when the folder belongs to another run."""
        self.folder, self.checkpoint = folder, checkpoint
        _check(folder)
        self.run = {"moequant": __version__, "model": fingerprint(checkpoint), "rows": digest(rows)}
        begun = not folder.exists()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            here = folder / "run.json"
            if not here.exists():
                with atomic(here) as partial:
                    partial.write_text(json.dumps(self.run), encoding="utf-8")
            elif _read(here) != self.run:
                raise OutputError(
                    f"{folder}: left by a run with another model, text or version, or damaged; "
                    "delete the folder to begin again"
                )
        except (OSError, OutputError) as error:
            if begun:
                self.leave()
            if isinstance(error, OutputError):
                raise
            raise OutputError(f"{folder}: cannot keep the state of this run ({error})") from None

    def finished(self) -> list[Calibration]:
        """The statistics of the layers that are finished, from the first. OutputError for a file that is
        damaged, or that belongs to another layer or run."""
        found: list[Calibration] = []
        while (path := self._layer(len(found))).exists():
            try:
                kept = store.load(path)
            except CorpusError as error:
                raise OutputError(f"{error}; or delete {self.folder} to begin again") from None
            if kept.model != self._model(len(found)):
                raise OutputError(
                    f"{path}: is of another layer or another run; delete {self.folder} to begin again"
                )
            found.append(kept.calibration)
        return found

    def add(self, layer: int, statistics: Calibration) -> None:
        """Layer `layer` is finished."""
        kept = store.Stored(self._model(layer), statistics, str(self.checkpoint.path))
        # One may be there behind those that are missing, of a run that died while it removed them.
        store.save(self._layer(layer), kept, overwrite=True)

    def _model(self, layer: int) -> store.Model:
        """What the statistics of a layer say that they are of."""
        return {**self.run, "layer": layer}

    def remove(self) -> None:
        """The run has ended: its result lies elsewhere."""
        if self.folder.is_dir():
            for file in self.folder.iterdir():
                file.unlink()
            self.folder.rmdir()

    def forget_states(self) -> None:
        """All layers are finished: only their statistics are needed from here on."""
        for file in self.folder.glob("hidden-*.f32"):
            file.unlink()

    def leave(self) -> None:
        """The run has failed: where no layer is finished there is nothing to go on from, and nothing is
        left."""
        if not self._layer(0).exists():
            self.remove()

    def _layer(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:04d}.safetensors"


def _read(path: Path) -> object:
    """What JSON a file holds, None where it holds none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None


def fingerprint(checkpoint: Checkpoint) -> str:
    """Names, places, sizes and times of all tensors' files: changes when the checkpoint does."""
    digest = hashlib.sha256(json.dumps(checkpoint.raw, sort_keys=True, default=str).encode())
    stored = {each.name: each for weight in checkpoint.weights for each in weight.origin.stored}
    refs = [ref for each in stored.values() for ref in each.parts.values()]
    for ref in sorted(refs, key=lambda ref: ref.name):
        digest.update(f"{ref.name} {ref.shape} {ref.dtype} {ref.begin}".encode())
    for name, stamp in sorted({(ref.file.name, ref.file.stamp) for ref in refs}):
        digest.update(f"{name} {stamp}".encode())
    return digest.hexdigest()


def digest(rows: Rows) -> str:
    """What tells these rows from others."""
    found = hashlib.sha256(rows.ids.numpy().tobytes())
    found.update(json.dumps([list(rows.ids.shape), rows.domains, rows.source]).encode())
    return found.hexdigest()
