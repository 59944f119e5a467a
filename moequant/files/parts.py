"""A file in several parts, named as llama.cpp names them: NAME-00001-of-00003.gguf and so on.

All parts wait in one hidden folder until the last is complete. Then each gets its name, the first part last:
whoever opens such a file opens its first part, so it is there when all others are. Where old and new have as
many parts, the old first part goes before. A run that dies in between is finished by the next to that target.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from moequant.files.rename import move
from moequant.files.temporary import prefix, remove, sync

PART = re.compile(r"(.*)-[0-9]{5}-of-([0-9]{5})\.gguf", re.DOTALL)

MOST = 2**16 - 1
"""llama.cpp counts parts in 16 bits."""


def part_names(path: Path, count: int) -> tuple[Path, ...]:
    """The names of the file `path` in so many parts; its own in one."""
    if count == 1:
        return (path,)
    return tuple(
        path.with_name(f"{path.stem}-{number:05}-of-{count:05}{path.suffix}")
        for number in range(1, count + 1)
    )


def members(path: Path) -> list[Path]:
    """Whatever is there under the name of the file `path`, or of a part of it, first parts first."""
    found = []
    for entry in path.parent.iterdir():
        part = PART.fullmatch(entry.name)
        if entry.name == path.name or (part and f"{part[1]}.gguf" == path.name):
            found.append(entry)
    return sorted(found)


def commit(partial: Path, path: Path, replace: bool) -> None:
    """From here on, what the folder `partial` holds is the file `path`, whoever has to `settle` it."""
    count = len(list(partial.iterdir()))
    assert {each.name for each in partial.iterdir()} == {each.name for each in part_names(path, count)}
    partial.rename(path.with_name(f"{prefix(path)}{'replace' if replace else 'put'}-{count:05}"))
    sync(path.parent)


def settle(path: Path) -> None:
    """Give the committed parts of `path` their names, also after a run that died while it did.

    FileExistsError when one has a name that it may not replace: then none of the new parts stays.
    """
    name = re.compile(re.escape(prefix(path)) + "(replace|put)-([0-9]{5})")
    for folder in list(path.parent.iterdir()):
        if (found := name.fullmatch(folder.name)) and folder.is_dir() and not folder.is_symlink():
            names, replace = part_names(path, int(found[2])), found[1] == "replace"
            _settle(folder, names, replace)
            for old in members(path) if replace else ():
                if old not in names:
                    old.unlink(missing_ok=True)
            remove(folder)


def _settle(folder: Path, names: tuple[Path, ...], replace: bool) -> None:
    """Move what still waits in `folder`."""
    first, *others = names
    for part in names:
        if part.exists() and (folder / part.name).exists() and part.samefile(folder / part.name):
            (folder / part.name).unlink()  # it died between link and unlink, where renames are made of them
    if not os.path.lexists(folder / first.name):
        return
    if replace and others:
        # Until the new first part is there, nothing may look like one whole file.
        first.unlink(missing_ok=True)
        sync(first.parent)
    try:
        for part in others:
            if os.path.lexists(folder / part.name):
                _put(folder / part.name, part, replace)
        sync(first.parent)
        _put(folder / first.name, first, replace)
    except FileExistsError:
        for part in others:
            if not os.path.lexists(folder / part.name):
                part.unlink(missing_ok=True)
        remove(folder)
        raise
    sync(first.parent)


def _put(old: Path, new: Path, replace: bool) -> None:
    if replace:
        old.replace(new)
    else:
        move(old, new)
