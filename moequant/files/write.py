"""Claiming targets and putting complete files and folders in their places."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from moequant.errors import MoequantError, OutputError
from moequant.files import parts as set_of_parts
from moequant.files.folder import carry_over
from moequant.files.lock import locked
from moequant.files.rename import exchange, move
from moequant.files.targets import Kind, Target, check_apart, unwritable
from moequant.files.temporary import aside, create, remove, repair, sweep, sync, sync_tree

_CLAIMED: ContextVar[Mapping[Path, Target]] = ContextVar("claimed", default={})  # noqa: B039  never changed
"""What this run has locked, by the absolute path that was given."""


@contextmanager
def claim(
    *files: Path | None,
    folder: Path | None = None,
    parts: Iterable[Path] = (),
    overwrite: bool = False,
    inputs: Iterable[str | Path | None] = (),
    finished: Collection[Path] = (),
) -> Iterator[None]:
    """All outputs of a run are checked, and locked while the block runs. None is an output not wanted.

    Inside, `atomic`, `atomic_folder` and `atomic_parts` know whether the targets may be replaced. Those that
    are `finished` may be there, for the caller to look at; nothing replaces them because of that.
    `inputs` are what the run reads; those that are no paths are passed over. OutputError when a target
    cannot be written, is there already and may not be replaced, is another target or an input, or when
    another run is writing it.
    """
    named: list[tuple[Path | None, Kind]] = [(path, "file") for path in files]
    named += [(folder, "folder"), *((path, "parts") for path in parts)]
    wanted = [(path, kind) for path, kind in named if path is not None]
    targets = [_claimed(*each) or Target.of(*each, overwrite) for each in wanted]
    check_apart(targets, _paths(inputs))
    for target in targets:
        target.check_link()
    with ExitStack() as stack:
        for target in targets:
            if _claimed(target.given, target.kind) is None:
                stack.enter_context(_locked(target, target.given in finished))
        mine = {target.given.absolute(): target for target in targets}
        token = _CLAIMED.set({**_CLAIMED.get(), **mine})
        stack.callback(_CLAIMED.reset, token)
        yield


def check_output(path: Path, overwrite: bool) -> None:
    """OutputError when no file can be put at `path`."""
    with claim(path, overwrite=overwrite):
        pass


@contextmanager
def atomic(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """A new file beside `path` to write to; takes its place when the block ends well, else is removed.

    What the claim on `path` said counts for `overwrite`. Without one it is claimed here. OutputError
    when the disk refuses, or when a file has appeared at `path` that may not be replaced.
    """
    with _target(path, "file", overwrite) as target, _partial(target) as partial:
        yield partial
        sync(partial)
        if target.overwrite:
            _check_file(target)
            partial.replace(target.path)
        else:
            _move(partial, target)
        sync(target.path.parent)


@contextmanager
def atomic_folder(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """A new folder beside `path` to fill; takes its place when the block ends well, else is removed.

    The block writes the names of its files into RECORD. With `overwrite` those files of the folder
    before are replaced by the new ones, and everything else in it is kept. Claims count as in `atomic`.
    """
    with _target(path, "folder", overwrite) as target:
        waiting = target.path.is_dir() and not any(target.path.iterdir())
        with _partial(target) as partial:
            yield partial
            sync_tree(partial)
            if waiting:
                _replace_empty(partial, target)
            elif target.overwrite and target.present:
                _swap(partial, target)
            else:
                _move(partial, target)
            sync(target.path.parent)


@contextmanager
def atomic_parts(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """The file `path` in one or more `part_names`: its name in a new folder to write them to.

    They take the place of all parts of the file before when the block ends well, else they are removed.
    Claims count as in `atomic`.
    """
    with _target(path, "parts", overwrite) as target, _partial(target) as partial:
        yield partial / target.path.name
        sync_tree(partial)
        if target.present and not target.overwrite:
            raise _appeared(target)
        set_of_parts.commit(partial, target.path, target.overwrite)
        try:
            set_of_parts.settle(target.path)
        except FileExistsError:
            raise _appeared(target) from None


@contextmanager
def _target(path: Path, kind: Kind, overwrite: bool) -> Iterator[Target]:
    """The target at that path, claimed for the block unless this run has it already."""
    folder, parts = path if kind == "folder" else None, [path] if kind == "parts" else []
    with claim(*[path] if kind == "file" else [], folder=folder, parts=parts, overwrite=overwrite):
        target = _claimed(path, kind)
        assert target is not None
        yield target


def _claimed(path: Path, kind: Kind) -> Target | None:
    """The target that this run holds under that path."""
    target = _CLAIMED.get().get(path.absolute())
    return target if target is not None and target.kind == kind else None


@contextmanager
def _locked(target: Target, finished: bool) -> Iterator[None]:
    """The target's lock is held, nothing of dead runs is left, and what is there may be replaced, or stays
    as it is `finished`."""
    with ExitStack() as stack:
        try:
            if stack.enter_context(locked(target.path)):
                with suppress(FileExistsError):
                    set_of_parts.settle(target.path)
                sweep(target.path)
            if not finished:
                target.check_free()
        except OSError as error:
            raise unwritable(target.given, error) from None
        yield


@contextmanager
def _partial(target: Target) -> Iterator[Path]:
    """A temporary beside the target, gone afterwards whatever happens; the disk's errors as OutputError."""
    try:
        partial = create(target.path, target.kind != "file")
    except OSError as error:
        raise unwritable(target.given, error) from error
    try:
        yield partial
    except MoequantError as error:  # people know the output, by the name that they gave it
        kept = target.given.parent if target.kind == "parts" else target.given
        said = str(error).replace(str(partial), str(kept)).replace(partial.name, target.given.name)
        error.args = (said,)
        raise
    except OSError as error:
        other = Path(str(error.filename or partial))
        if other in (partial, target.path) or partial in other.parents:
            raise unwritable(target.given, error) from error
        raise OutputError(f"{other}: {error.strerror}, while {target.given} was written") from error
    finally:
        if target.folder:
            repair(target.path)
        if target.kind == "parts":
            with suppress(FileExistsError):
                set_of_parts.settle(target.path)
        with suppress(OSError):  # the next run to the target removes it
            remove(partial)


def _move(partial: Path, target: Target) -> None:
    try:
        move(partial, target.path)
    except FileExistsError:
        raise _appeared(target) from None


def _replace_empty(partial: Path, target: Target) -> None:
    """An empty folder was waiting; a rename replaces it as long as it is empty."""
    try:
        partial.rename(target.path)
    except (FileExistsError, NotADirectoryError):
        raise _appeared(target) from None
    except OSError:
        if target.path.is_dir() and any(target.path.iterdir()):
            raise _appeared(target) from None
        raise


def _swap(partial: Path, target: Target) -> None:
    """The new folder gets the old one's name, and the old one a temporary name, with which it goes."""
    carry_over(target.path, partial, target.ours())
    shutil.copymode(target.path, partial)
    if exchange(partial, target.path):
        return
    target.path.rename(aside(target.path))
    partial.rename(target.path)


def _check_file(target: Target) -> None:
    """What may be replaced is a file; anything else has come since the run began."""
    if target.path.is_symlink() or (target.path.exists() and not target.path.is_file()):
        raise _appeared(target)


def _appeared(target: Target) -> OutputError:
    return OutputError(f"{target.given}: appeared during this run and is kept; run again with another name")


def _paths(inputs: Iterable[str | Path | None]) -> list[Path]:
    """The inputs that are there. Others are names of data sets, or missed by whoever reads them."""
    found = []
    for each in inputs:
        try:
            if each is not None and Path(each).exists():
                found.append(Path(each))
        except (OSError, ValueError):
            continue
    return found
