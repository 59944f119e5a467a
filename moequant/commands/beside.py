"""What a conversion writes beside its outputs: once, whoever goes on from whom."""

from __future__ import annotations

import filecmp
from collections.abc import Callable
from pathlib import Path

from moequant.commands.job import Job
from moequant.commands.journal import RunJournal
from moequant.commands.settings import Settings
from moequant.containers.gguf import imatrix
from moequant.containers.gguf.export import export
from moequant.errors import OutputError
from moequant.files import scratch
from moequant.report import card
from moequant.report.conversion import Conversion
from moequant.values import Calibration


def write_imatrix(job: Job, calibration: Calibration, path: Path, journal: RunJournal | None) -> None:
    """Write the statistics beside the output, unless the run that this one continues has written them."""
    exported = export(job.model)
    if path.exists() and not job.settings.overwrite:
        with scratch() as folder:
            imatrix.write(folder / "again", exported, calibration, "none")
            if not filecmp.cmp(folder / "again", path, shallow=False):
                raise OutputError(f"{path}: exists already; give another name or --overwrite")
        return
    if journal is not None:
        journal.announce(path)
    imatrix.write(path, exported, calibration, "none")


def write_beside(
    path: Path, write: Callable[[], None], settings: Settings, journal: RunJournal | None
) -> None:
    """Write a file beside the outputs, unless the run that this one continues has written it."""
    if journal is not None:
        if path.exists() and journal.announced(path) and not settings.overwrite:
            return
        journal.announce(path)
    write()


def write_card(made: Conversion, path: Path, settings: Settings, journal: RunJournal | None) -> None:
    """The card beside the outputs, or in the folder, unless a run that was killed wrote that very one."""
    if (picture := card.picture_for(made, path)) is not None:
        write_beside(picture, lambda: card.draw(made, picture), settings, journal)
    text = card.text(made, path.parent, settings.imatrix_out)
    ours = settings.overwrite or settings.format != "gguf"  # a folder has no other card
    if path.exists() and not ours:
        if path.read_bytes() != text.encode():
            raise OutputError(f"{path}: exists already; give another name or --overwrite")
        return
    if journal is not None:
        journal.announce(path)
    card.write(text, path, ours)
