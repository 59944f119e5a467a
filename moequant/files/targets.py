"""What may be an output: a regular file or a folder, apart from everything else that the run touches."""

from __future__ import annotations

import glob
import os
import re
import shutil
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Literal

from moequant.errors import OutputError
from moequant.files.folder import recorded
from moequant.files.parts import PART, members

NAME_BYTES = 230
"""Names may have 255 bytes; the rest is for the marks of temporary names."""

_OPEN_FILES = ("/dev/fd/", "/dev/std", "/proc/")
"""Names of what a process has open. What they lead to is not a place that a file can be put at."""

_TAKEN = re.compile(r"\d+ requested and \d+ written")

Kind = Literal["file", "folder", "parts"]
"""What stands at a target; `parts` is a file in as many parts as it takes, known when it is written."""


@dataclass(frozen=True, slots=True)
class Target:
    """An output: the path as it was `given`, where it leads, and what may happen to what is there."""

    given: Path
    path: Path
    kind: Kind
    overwrite: bool

    @classmethod
    def of(cls, given: Path, kind: Kind, overwrite: bool) -> Target:
        """The target that `given` names, symlinks followed here and never again.

        OutputError when neither file nor folder can be put there.
        """
        try:
            path = _resolved(given, kind == "folder")
        except (OSError, ValueError, RuntimeError) as error:
            raise unwritable(given, error) from None
        if not path.parent.is_dir():
            raise OutputError(f"{given.parent}: no such folder; create it first")
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise OutputError(f"{given.parent}: not writable; give a name in another folder")
        return cls(given, path, kind, overwrite)

    @property
    def folder(self) -> bool:
        """Whether it is a folder."""
        return self.kind == "folder"

    @property
    def there(self) -> list[Path]:
        """What is in its place: of a file in parts, each of them."""
        if self.kind == "parts":
            return members(self.path)
        return [self.path] if os.path.lexists(self.path) else []

    @property
    def present(self) -> bool:
        """Whether something has that name. A symlink is something, wherever it leads."""
        return bool(self.there) or self.given.is_symlink()

    def check_link(self) -> None:
        """OutputError for a link to a file elsewhere: nobody who names an output must know where it leads."""
        if not self.folder and self.given.is_symlink() and self.path.parent != self.given.parent.resolve():
            raise OutputError(f"{self.given}: is a link to {self.path}; give that name, or remove the link")

    def check_free(self) -> None:
        """OutputError when something is there that this run may not replace."""
        if not self.present or (self.folder and self.path.is_dir() and not any(self.path.iterdir())):
            return
        if not self.overwrite:
            shown = next((each for each in self.there if each != self.path), self.given)
            raise OutputError(f"{shown}: exists already; give another name or --overwrite")
        if self.folder:
            self.ours()
        for part in self.there if self.kind == "parts" else ():
            if part.is_symlink() or not part.is_file():
                raise OutputError(f"{part}: is in the place of a part of {self.given}; move it away")

    def ours(self) -> frozenset[str]:
        """The files in the folder that moequant wrote. OutputError when the folder may not be replaced."""
        if self.path.is_mount():
            raise OutputError(f"{self.given}: is a mount point and is not replaced; give a folder in it")
        found = recorded(self.path)
        if found is None:
            raise OutputError(
                f"{self.given}: is not a folder that moequant made and is not replaced; give another name"
            )
        return found


def check_space(folder: Path, size: int) -> None:
    """OutputError when `size` bytes do not fit into `folder`."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OutputError(
            f"{folder}: {size:,} bytes are needed, {free:,} are free; make room, or write to another disk"
        )


def unwritable(path: Path, error: Exception) -> OutputError:
    """The one line for an error of the operating system while `path` was written."""
    return OutputError(f"{path}: cannot be written ({reason(error)})")


def reason(error: Exception) -> str:
    """What the system says. Where a disk takes less than it is given, numpy says how much and not why."""
    if _TAKEN.fullmatch(str(error)):
        return "the disk took less than it was given; is it full?"
    return str(getattr(error, "strerror", None) or error)


def _resolved(given: Path, folder: bool) -> Path:
    """Where `given` leads. OutputError for a name or a kind of file that is no output."""
    _check_name(given, given.name)
    if str(given.absolute()).startswith(_OPEN_FILES):
        raise OutputError(f"{given}: is not a place for a file; give another name")
    try:
        mode = given.stat().st_mode
    except FileNotFoundError:
        mode = None
    path = given.resolve()
    if not path.name:
        raise OutputError(f"{given}: is not a place for a file; give another name")
    _check_name(given, path.name)
    if mode is None:
        return path
    if stat.S_ISDIR(mode):
        if not folder:
            raise OutputError(f"{given}: is a folder; give a file name")
    elif not stat.S_ISREG(mode):
        raise OutputError(f"{given}: is a device, a pipe or a socket; give another name")
    elif folder:
        raise OutputError(f"{given}: is a file; give a folder name")
    return path


def _check_name(given: Path, name: str) -> None:
    if len(os.fsencode(name)) > NAME_BYTES:
        raise OutputError(f"{given}: the name has more than {NAME_BYTES} bytes; give a shorter one")


def check_apart(targets: Sequence[Target], inputs: Iterable[Path]) -> None:
    """OutputError when two outputs are one file, or an output would replace what the run reads."""
    for one, two in combinations(targets, 2):
        if _overlap(one, two) or _overlap(two, one):
            raise OutputError(f"{two.given}: one name for two outputs; give each its own")
    for source in inputs:
        for target in targets:
            if target.folder:
                _check_folder_apart(target, source.resolve())
            elif any(_same(there, file) for there in target.there for file in _files(source)):
                raise OutputError(f"{target.given}: is read by this run; give another name")


def _overlap(one: Target, two: Target) -> bool:
    """Whether the name of `two` is that of `one`, or of a part of it."""
    part = PART.fullmatch(two.path.name) if one.kind == "parts" else None
    whole = two.path.with_name(f"{part[1]}.gguf") if part else two.path
    return one.path == whole or _same(one.path, two.path)


def _check_folder_apart(target: Target, source: Path) -> None:
    if source.is_dir() and (target.path == source or target.path in source.parents):
        raise OutputError(f"{target.given}: holds the model that is read; give another name")


def _files(source: Path) -> Iterable[Path]:
    """All files of an input: of a folder, and of a GGUF file in several parts."""
    if source.is_dir():
        return source.rglob("*")
    part = PART.fullmatch(source.name)
    return source.parent.glob(f"{glob.escape(part[1])}-*.gguf") if part else (source,)


def _same(one: Path, two: Path) -> bool:
    """Whether both names lead to one file; hard links do too."""
    try:
        return one.samefile(two)
    except (OSError, ValueError):
        return False
