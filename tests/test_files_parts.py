"""A file in parts is one output: all of the old or all of the new, wherever a run dies."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from moequant.errors import OutputError
from moequant.files import atomic_parts, claim, part_names, rename
from tests.strike import KERNELS, killed_at_every_step, on


def write(out: Path, count: int, text: str, overwrite: bool = False) -> None:
    """The file `out` in `count` parts, each of which says which it is."""
    with atomic_parts(out, overwrite) as path:
        for number, part in enumerate(part_names(path, count)):
            part.write_text(f"{text} {number}")


def read(out: Path, count: int) -> str | None:
    """What all parts say, None without the first: nobody opens them then."""
    parts = part_names(out, count)
    if not parts[0].exists():
        return None
    texts = [part.read_text().split() for part in parts]
    (said,) = {text for text, _ in texts}
    assert [int(number) for _, number in texts] == list(range(count))
    return said


def there(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def refused(action: Callable[[], object], says: str) -> None:
    with pytest.raises(OutputError, match=says):
        action()


def test_parts_are_there_when_all_are_complete(tmp_path: Path, kernel: str) -> None:
    out = tmp_path / "a.b.gguf"
    with atomic_parts(out) as path:
        assert path.name == out.name
        for part in part_names(path, 3):
            part.write_text("x")
        assert not [name for name in there(tmp_path) if not name.startswith(".")]
    assert there(tmp_path) == {f"a.b-0000{number}-of-00003.gguf" for number in (1, 2, 3)}
    with pytest.raises(KeyError), atomic_parts(out, overwrite=True) as path:
        part_names(path, 2)[0].write_text("half")
        raise KeyError
    assert len(there(tmp_path)) == 3


@pytest.mark.parametrize("before", [1, 2, 3])
def test_all_of_the_old_parts_make_room(tmp_path: Path, before: int) -> None:
    out = tmp_path / "m.gguf"
    write(out, before, "old")
    (tmp_path / "other-00001-of-00002.gguf").write_text("mine")
    (tmp_path / "m-1-of-3.gguf").write_text("mine")
    refused(lambda: write(out, 2, "new"), rf"{part_names(out, before)[0].name}: exists already")
    write(out, 2, "new", overwrite=True)
    assert read(out, 2) == "new"
    assert there(tmp_path) == {
        "m-00001-of-00002.gguf", "m-00002-of-00002.gguf", "other-00001-of-00002.gguf", "m-1-of-3.gguf"
    }  # fmt: skip


def test_what_is_no_part_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "m.gguf"
    (tmp_path / "m-00001-of-00002.gguf").mkdir()
    for overwrite in (False, True):
        says = "in the place of a part" if overwrite else "exists already"
        refused(lambda overwrite=overwrite: write(out, 2, "new", overwrite), says)
    assert there(tmp_path) == {"m-00001-of-00002.gguf"}


@pytest.mark.parametrize("at", [0, 1, 2])
def test_what_appears_meanwhile_is_kept(tmp_path: Path, kernel: str, at: int) -> None:
    out = tmp_path / "m.gguf"

    def late() -> None:
        with atomic_parts(out) as path:
            for part in part_names(path, 3):
                part.write_text("x")
            part_names(out, 3)[at].write_text("mine")

    refused(late, "appeared during this run and is kept")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("at", [0, 1, 2])
def test_what_appears_at_the_last_moment_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    out, renames = tmp_path / "m.gguf", rename.renameat2

    def late(old: Path, new: Path, flag: int) -> bool:
        if new == part_names(out, 3)[at]:
            new.write_text("mine")
        return renames(old, new, flag)

    monkeypatch.setattr(rename, "renameat2", late)
    refused(lambda: write(out, 3, "x"), "appeared during this run and is kept")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_names_of_parts_are_no_other_output(tmp_path: Path) -> None:
    out, part = tmp_path / "m.gguf", tmp_path / "m-00001-of-00002.gguf"
    for other in (out, part):
        refused(lambda other=other: claim(other, parts=[out]).__enter__(), "one name for two outputs")
    part.write_text("read")
    os.link(part, tmp_path / "hard.gguf")
    for read in (part, tmp_path / "hard.gguf"):
        refused(
            lambda read=read: claim(parts=[out], overwrite=True, inputs=[read]).__enter__(),
            "is read by this run",
        )
    with claim(tmp_path / "n-00001-of-00002.gguf", parts=[tmp_path / "m-.gguf"]):
        pass


@pytest.mark.parametrize(("before", "count"), [(0, 3), (0, 1), (1, 1), (1, 2), (2, 1), (2, 3), (3, 3)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_killed_anywhere_it_is_old_or_complete(
    struck: Callable[..., None], tmp_path: Path, kernel: str, before: int, count: int
) -> None:
    struck("killed_anywhere", tmp_path, kernel, before, count)


def killed_anywhere(folder: str, kernel: str, before: int, count: int) -> None:
    """In the small process."""
    here, was = Path(folder), "old" if before else None
    out = here / "m.gguf"

    def reset() -> None:
        for path in here.iterdir():
            path.unlink()
        if before:
            write(out, before, "old")

    def check(step: int) -> None:
        new, old = read(out, count), read(out, before) if before else None
        if before != count:
            assert new == "new" or (new is None and old == was), step
        else:  # No part of the old set may stand beside one of the new: for a moment there is no first part.
            assert new in ("old", "new", None if count > 1 else "old"), step
        committed = any("-replace-" in name or "-put-" in name for name in there(here))
        with claim(parts=[out], overwrite=True):
            pass
        if committed or new == "new":
            assert there(here) == {path.name for path in part_names(out, count)}, step
            assert read(out, count) == "new", step
        else:
            names = {path.name for path in part_names(out, before)} if before else set()
            assert there(here) == names and (read(out, before) if before else None) == was, step
        reset()

    with on(kernel):
        reset()
        assert killed_at_every_step(lambda: write(out, count, "new", overwrite=before > 0), check) > 12
