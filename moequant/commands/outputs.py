"""What a conversion writes, and under which names: a file for every size that was asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager, nullcontext
from pathlib import Path

from moequant.checkpoint import Folder, repository
from moequant.commands.job import Job
from moequant.commands.journal import finished_by, journal_of
from moequant.commands.journal_files import bytes_of, check
from moequant.commands.settings import Settings
from moequant.errors import MoequantError, OutputError
from moequant.files import check_space, claim
from moequant.report.card import picture_path

TYPE = "{type}"
"""Stands for a size in a name: `a-{type}.gguf` is `a-Q4_K_M.gguf`, `a-12G.gguf` or `a-3.5bpw.gguf`."""


CARD = "README.md"
"""What the Hub shows of a repository."""


def names(model: Path, out: Path, settings: Settings) -> tuple[Path, ...]:
    """The output of every size that `settings` name.

    `out` is the output itself where there is one; else a name with `{type}` in it, or a folder of files that
    are called after the model. OutputError for a name that does not fit.
    """
    labels = [each.label for each in settings.each] if settings.format == "gguf" else []
    if TYPE in str(out):
        if not labels:
            raise OutputError(f"{out}: {TYPE} stands for the size of a GGUF file; give a folder's name")
        return tuple(Path(str(out).replace(TYPE, label)) for label in labels)
    if not labels or (len(labels) == 1 and not out.is_dir()):
        return (out,)
    if out.suffix == ".gguf" and not out.is_dir():
        name = f"{out.stem}-{TYPE}.gguf"
        raise OutputError(f"{out}: one name for {len(labels)} files; give a folder, or {name}")
    name = repository(model).rpartition("/")[2]
    return tuple(out / f"{name}-{label}.gguf" for label in labels)


@contextmanager
def claimed(model: Folder, outs: Sequence[Path], settings: Settings) -> Iterator[frozenset[Path]]:
    """All outputs of a conversion, locked together while the block runs, and those of them that the journal
    has as finished. OutputError as `claim` raises it.

    A folder for several files is made here, and is gone again if nothing came to lie in it. With
    `settings.fresh` nothing counts as finished.
    """
    journal = journal_of(outs)
    finished = frozenset() if settings.fresh else finished_by(journal, outs)
    is_file = settings.format == "gguf"
    card = card_path(outs, settings) if is_file else None
    picture = None if card is None or not settings.eval_tokens else picture_path(card, len(outs))
    whole, parts = ((), outs) if settings.split is not None else (outs, ())
    files = (
        *(whole if is_file else ()),
        settings.imatrix_out,
        card,
        picture,
        settings.html,
    )
    inputs = (*model.inputs, *settings.inputs)
    with (
        _made(outs[0].parent) if len(outs) > 1 else nullcontext(),
        claim(
            *files,
            folder=None if is_file else outs[0],
            parts=parts if is_file else (),
            overwrite=settings.overwrite,
            inputs=inputs,
            finished=finished,
        ),
    ):
        if settings.fresh:
            check(journal)
        elif finished != finished_by(journal, outs):
            raise OutputError(
                f"{journal}: another run has just finished and removed it; give the same command again"
            )
        yield finished


def card_path(outs: Sequence[Path], settings: Settings) -> Path | None:
    """Where README.md goes: into a folder that is written, beside files where a person says so."""
    if settings.format != "gguf":
        return outs[0] / CARD
    if settings.card is None or settings.card.suffix == ".md":
        return settings.card
    return settings.card / CARD


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """The folder is there while the block runs."""
    is_new = not folder.exists() and folder.absolute().parent.is_dir()
    if is_new:
        try:
            folder.mkdir()
        except OSError as error:
            raise OutputError(f"{folder}: cannot be made ({error.strerror or error})") from error
    try:
        yield
    finally:
        if is_new and not any(folder.iterdir()):
            folder.rmdir()


def check_targets(jobs: Sequence[Job], outs: Sequence[Path], finished: Set[Path]) -> None:
    """OutputError when one of the outputs that are not finished cannot be put there, or the disk has no room
    for all together."""
    needed: dict[Path, int] = {}
    for job, out in zip(jobs, outs, strict=True):
        if out in finished:
            continue
        job.container.check_target(out, job.plan)
        folder = out.absolute().parent
        needed[folder] = needed.get(folder, 0) + job.size
    old = journal_of(outs).absolute()
    if jobs[0].settings.fresh and old.parent in needed:
        needed[old.parent] -= bytes_of(old)  # it goes first
    for folder, size in needed.items():
        check_space(folder, size)


@contextmanager
def keeping(finished: Sequence[Path]) -> Iterator[None]:
    """An error in the block says which outputs were finished before it: they are complete, and stay."""
    try:
        yield
    except MoequantError as error:
        if not finished:
            raise
        kept = ", ".join(path.name for path in finished)
        raise type(error)(f"{error} (finished before it, and kept: {kept})") from error
