"""Outputs: refused early, complete or absent wherever a run dies, never in the place of what is not ours."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moequant.errors import OutputError, VerifyError
from moequant.files import (
    RECORD,
    Interrupted,
    atomic,
    atomic_folder,
    atomic_parts,
    check_output,
    claim,
    interruptible,
    scratch,
)
from tests.strike import KERNELS, killed_at_every_step, on

NEW, OLD = b"new" * 5000, b"old"


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def refused(action: Callable[[], object], says: str) -> None:
    """One line, which names what is wrong."""
    with pytest.raises(OutputError, match=says) as error:
        action()
    assert "\n" not in str(error.value)


def put(path: Path, overwrite: bool = False, content: bytes = NEW) -> None:
    """A file, written in two parts."""
    with atomic(path, overwrite) as partial, partial.open("wb") as file:
        file.write(content[:7])
        file.flush()
        os.fsync(file.fileno())
        file.write(content[7:])


def fill(path: Path, overwrite: bool = False, **files: str) -> None:
    """A folder of moequant's: `files` by name, and the record of them."""
    with atomic_folder(path, overwrite) as partial:
        record = {"made_by": "moequant 1", "files": [RECORD, *files]}
        for name, text in {**files, RECORD: json.dumps(record)}.items():
            (partial / name).parent.mkdir(exist_ok=True)
            (partial / name).write_text(text)


def test_a_file_is_there_when_it_is_complete(tmp_path: Path, kernel: str) -> None:
    out = tmp_path / "out"
    with atomic(out) as partial:
        partial.write_bytes(NEW)
        assert not out.exists() and partial.parent == tmp_path
    assert out.read_bytes() == NEW and names(tmp_path) == {"out"}
    umask = os.umask(0o027)
    try:
        put(tmp_path / "shared")
    finally:
        os.umask(umask)
    assert (tmp_path / "shared").stat().st_mode & 0o777 == 0o640, "readable as any new file is"


def test_an_error_leaves_what_was_there(tmp_path: Path, kernel: str) -> None:
    out = tmp_path / "out"
    out.write_bytes(OLD)
    with pytest.raises(KeyError), atomic(out, overwrite=True) as partial:
        partial.write_bytes(NEW)
        raise KeyError
    fill(tmp_path / "folder", a="1")
    with pytest.raises(KeyError), atomic_folder(tmp_path / "folder", overwrite=True) as partial:
        (partial / "b").write_text("2")
        raise KeyError
    assert out.read_bytes() == OLD and names(tmp_path) == {"out", "folder", "folder/a", f"folder/{RECORD}"}


def test_a_lock_that_cannot_be_removed_does_not_hide_what_went_wrong(tmp_path: Path) -> None:
    """As in a folder that has become read-only; a folder in its place cannot be unlinked either."""
    with pytest.raises(KeyError), atomic(tmp_path / "out"):
        (tmp_path / ".out.moequant-lock").unlink()
        (tmp_path / ".out.moequant-lock").mkdir()
        raise KeyError
    (tmp_path / ".out.moequant-lock").rmdir()
    put(tmp_path / "out")


def test_a_disk_that_takes_a_part_is_full(tmp_path: Path) -> None:
    """numpy tells numbers of items, and no reason."""

    def half() -> None:
        with atomic(tmp_path / "out") as partial:
            np.zeros(100_000, np.uint8).tofile(partial)

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
    try:
        refused(half, r"out: cannot be written \(the disk took less than it was given; is it full\?\)")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def test_errors_of_the_disk_are_one_line(tmp_path: Path) -> None:
    def full() -> None:
        with atomic(tmp_path / "out"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def vanished() -> None:
        with atomic(tmp_path / "out"):
            (tmp_path / "model").read_bytes()

    refused(full, "out: cannot be written .No space left")
    refused(vanished, "model: No such file or directory, while .*out was written")
    assert not names(tmp_path)


def test_what_is_no_place_for_a_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "to-pipe").symlink_to("pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(OLD)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
    for name, says in (
        ("pipe", "a device, a pipe or a socket"),
        ("to-pipe", "a device, a pipe or a socket"),
        ("socket", "a device, a pipe or a socket"),
        ("/dev/null", "a device, a pipe or a socket"),
        ("/dev/stdout", "not a place for a file"),
        ("/proc/self/fd/1", "not a place for a file"),
        ("loop", "cannot be written .*symbolic links"),
        ("folder", "is a folder; give a file name"),
        ("none/out", "none: no such folder; create it first"),
        ("file/out", "cannot be written .Not a directory"),
        ("n" * 231, "more than 230 bytes"),
        ("\N{SNOWMAN}" * 77, "more than 230 bytes"),
        ("nul\0", "cannot be written"),
        ("/", "not a place for a file"),
    ):
        for overwrite in (False, True):
            refused(lambda name=name, overwrite=overwrite: check_output(tmp_path / name, overwrite), says)
    for name, says in (
        ("file", "is a file; give a folder name"),
        ("pipe", "a device"),
        ("none/x", "create it"),
    ):
        refused(lambda name=name: claim(folder=tmp_path / name, overwrite=True).__enter__(), says)
    put(tmp_path / ("n" * 230))
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "socket").is_socket()


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    refused(lambda: check_output(tmp_path / "locked" / "out", False), "not writable")


def test_nothing_is_replaced_unasked(tmp_path: Path, kernel: str) -> None:
    (tmp_path / "old").write_bytes(OLD)
    (tmp_path / "nowhere").symlink_to(tmp_path / "absent")
    for name in ("old", "nowhere"):
        refused(lambda name=name: check_output(tmp_path / name, False), "exists already")
    (tmp_path / "link").symlink_to("old")
    put(tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "old").read_bytes() == NEW
    put(tmp_path / "nowhere", overwrite=True)
    assert (tmp_path / "absent").read_bytes() == NEW
    assert names(tmp_path) == {"old", "nowhere", "absent", "link"}


def test_a_link_to_another_folder_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "thesis").write_bytes(OLD)
    for name, leads in (("link", "far/thesis"), ("nowhere", "far/absent")):
        (tmp_path / name).symlink_to(leads)
        for overwrite in (False, True):
            refused(
                lambda name=name, how=overwrite: put(tmp_path / name, overwrite=how), f"link to .*{leads}"
            )
    (tmp_path / "near").symlink_to("far")
    put(tmp_path / "near" / "new")
    assert names(tmp_path / "far") == {"thesis", "new"} and (tmp_path / "far" / "thesis").read_bytes() == OLD


@pytest.mark.parametrize("what", ["file", "folder", "symlink", "empty folder"])
def test_what_appears_meanwhile_is_kept(tmp_path: Path, kernel: str, what: str) -> None:
    out = tmp_path / "out"
    appear: dict[str, Callable[[], object]] = {
        "file": lambda: out.write_bytes(OLD),
        "folder": lambda: [out.mkdir(), (out / "thesis").write_bytes(OLD)],
        "symlink": lambda: out.symlink_to(tmp_path / "thesis"),
        "empty folder": out.mkdir,
    }

    def late(writer: Callable[[Path], object]) -> None:
        with writer(out):  # type: ignore[attr-defined]
            appear[what]()

    for writer in (atomic, atomic_folder):
        refused(lambda writer=writer: late(writer), "out: appeared during this run and is kept")
        left = names(tmp_path)
        assert left == ({"out", "out/thesis"} if what == "folder" else {"out"})
        (out / "thesis").unlink() if what == "folder" else None
        out.rmdir() if out.is_dir() else out.unlink()


def test_a_waiting_empty_folder_is_filled_as_long_as_it_is_empty(tmp_path: Path, kernel: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(OutputError, match="appeared"), atomic_folder(out):
        (out / "thesis").write_bytes(OLD)
    assert names(tmp_path) == {"out", "out/thesis"}
    (out / "thesis").unlink()
    fill(out, a="1")
    assert (out / "a").read_text() == "1"


def test_outputs_are_no_inputs_and_not_each_other(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for name in ("weights", "x-00001-of-00002.gguf", "x-00002-of-00002.gguf"):
        (model / name).write_bytes(OLD)
    (tmp_path / "stats").symlink_to("model/weights")
    os.link(model / "weights", tmp_path / "hard")
    (tmp_path / "again").symlink_to("model")

    def claimed(*files: str, folder: str | None = None, read: str = "model") -> Callable[[], object]:
        paths, target = [tmp_path / name for name in files], folder and tmp_path / folder
        return claim(*paths, folder=target, overwrite=True, inputs=[tmp_path / read, "a/dataset"]).__enter__

    for name in ("model/weights", "again/weights", "stats", "hard"):
        refused(claimed(name), "is read by this run")
    refused(claimed("hard", read="stats"), "is read by this run")
    refused(claimed("model/x-00002-of-00002.gguf", read="model/x-00001-of-00002.gguf"), "is read by this run")
    refused(claimed("new", "again/../new", read="stats"), "one name for two outputs")
    refused(claimed("hard", "stats", read="absent"), "one name for two outputs")
    refused(claimed("new", folder="new"), "one name for two outputs")
    for name in ("model", "again", "."):
        refused(claimed(folder=name), "holds the model that is read")
    with claim(model / "q.gguf", tmp_path / "new", folder=model / "int4", inputs=[model, None]):
        pass
    assert (model / "weights").read_bytes() == OLD


def test_two_runs_do_not_meet(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with claim(out, tmp_path / "other"):
        raised: list[str] = []

        def second() -> None:
            try:
                put(out, overwrite=True)
            except OutputError as error:
                raised.append(str(error))

        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        assert raised and "out: another run is writing it" in raised[0]
        child = "import sys, moequant.files as f, pathlib; f.check_output(pathlib.Path(sys.argv[1]), True)"
        done = subprocess.run(
            [sys.executable, "-c", child, str(out)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 1 and "another run is writing it" in done.stderr
        put(out)
    assert out.read_bytes() == NEW and names(tmp_path) == {"out"}


def test_a_lock_is_kept_beside_the_file_that_a_link_leads_to(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(OLD)
    (tmp_path / "link").symlink_to("real")
    with claim(tmp_path / "link", overwrite=True):
        refused(lambda: put(tmp_path / "real", overwrite=True), "real: another run is writing it")


def test_what_only_looks_like_ours_is_kept(tmp_path: Path) -> None:
    theirs = {".out.moequant-notes", ".out.moequant-0123456", ".other.moequant-01234567", ".out.12.partial"}
    for name in theirs:
        (tmp_path / name).write_bytes(OLD)
    (tmp_path / ".out.moequant-01234567").write_bytes(OLD)
    (tmp_path / ".out.moequant-89abcdef").symlink_to(".out.moequant-notes")
    put(tmp_path / "out")
    assert names(tmp_path) == {"out", *theirs}
    (tmp_path / ".x.moequant-lock").write_bytes(b"a diary")
    refused(lambda: put(tmp_path / "x"), r"\.x\.moequant-lock: is in the place of a lock file")
    (tmp_path / ".y.moequant-lock").symlink_to(".x.moequant-lock")
    refused(lambda: put(tmp_path / "y"), "y: cannot be written")
    assert (tmp_path / ".x.moequant-lock").read_bytes() == b"a diary"


def test_a_folder_is_replaced_and_what_is_not_ours_is_kept(tmp_path: Path, kernel: str) -> None:
    out = tmp_path / "out"
    fill(out, weights="old", gone="old", **{"sub/ours": "old"})
    (out / ".git" / "objects").mkdir(parents=True, mode=0o700)
    (out / ".git" / "HEAD").write_text("main")
    (out / "sub" / "notes").write_text("mine")
    (out / "link").symlink_to("notes")
    (out / "to-git").symlink_to(".git")
    refused(lambda: fill(out, weights="new"), "exists already")
    fill(out, overwrite=True, weights="new")
    kept = {".git", ".git/objects", ".git/HEAD", "sub", "sub/notes", "link", "to-git"}
    assert names(out) == {"weights", RECORD, *kept} and names(tmp_path) & kept == set()
    assert (out / "weights").read_text() == "new" and (out / "sub" / "notes").read_text() == "mine"
    assert (out / "to-git").is_symlink() and (out / ".git/objects").stat().st_mode & 0o777 == 0o700
    (out / "tokenizer").write_text("mine")
    refused(lambda: fill(out, overwrite=True, tokenizer="new"), "tokenizer: was not written by moequant")
    assert (out / "tokenizer").read_text() == "mine" and (out / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "record", [None, "[]", "{", '{"made_by": "moequant 1"}', '{"made_by": "me", "files": []}', "[" * 9999]
)
def test_a_folder_of_somebody_else_is_kept(tmp_path: Path, record: str | None) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis").write_bytes(OLD)
    if record is not None:
        (tmp_path / "out" / RECORD).write_text(record)
    refused(lambda: fill(tmp_path / "out", overwrite=True), "is not a folder that moequant made")


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_file_killed_anywhere_is_old_or_complete(
    struck: Callable[..., None], tmp_path: Path, kernel: str
) -> None:
    struck("file_killed_anywhere", tmp_path, kernel)


def file_killed_anywhere(folder: str, kernel: str) -> None:
    """In the small process."""
    for old in (None, OLD):
        out = Path(folder) / f"out {old!r}"
        if old is not None:
            out.write_bytes(old)

        here = names(Path(folder)) | {out.name}

        def check(step: int, out: Path = out, old: bytes | None = old, here: set[str] = here) -> None:
            assert (out.read_bytes() if out.exists() else None) in (old, NEW), step
            put(out, overwrite=True)
            assert out.read_bytes() == NEW and names(out.parent) == here, step
            out.unlink() if old is None else out.write_bytes(old)

        with on(kernel):
            killed = killed_at_every_step(lambda out=out, old=old: put(out, overwrite=old is not None), check)
        assert killed > 12, "there are that many operations at least"


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_folder_killed_anywhere_is_old_or_complete(
    struck: Callable[..., None], tmp_path: Path, kernel: str
) -> None:
    struck("folder_killed_anywhere", tmp_path, kernel)


def folder_killed_anywhere(folder: str, kernel: str) -> None:
    """In the small process."""
    out = Path(folder) / "out"
    old, new = {"a": "old", "gone": "old"}, {"a": "new", "b": "new"}

    def reset() -> None:
        if out.exists():
            fill(out, overwrite=True, **old)
        else:
            fill(out, **old)
            (out / "notes").write_text("mine")

    def check(step: int) -> None:
        left = {"notes": "mine"}
        swapped_in_two = kernel != "renameat2" and not out.exists()
        found = {} if swapped_in_two else {path.name: path.read_text() for path in out.iterdir()}
        found.pop(RECORD, None)
        assert found in ({}, old | left, new | left) and (found or swapped_in_two), step
        fill(out, overwrite=True, **new)
        found = {path.name: path.read_text() for path in out.iterdir() if path.name != RECORD}
        whole = {"out", *(f"out/{name}" for name in (*found, RECORD))}
        assert found == new | left and names(out.parent) == whole, step
        reset()

    with on(kernel):
        reset()
        assert killed_at_every_step(lambda: fill(out, overwrite=True, **new), check) > 25


def test_signals_unwind_and_later_ones_are_ignored(tmp_path: Path) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        inherited = signal.signal(number, signal.default_int_handler)  # in the background it may be ignored
        with pytest.raises(Interrupted) as raised, interruptible(), atomic(tmp_path / "out"):
            try:
                os.kill(os.getpid(), number)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)
        assert raised.value.exit_code == 128 + number and str(raised.value) == number.name
        assert signal.signal(number, inherited) == signal.default_int_handler and not names(tmp_path)
    ignored = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptible():
            os.kill(os.getpid(), signal.SIGHUP)  # as under nohup
    finally:
        signal.signal(signal.SIGHUP, ignored)


def test_a_signal_that_python_loses_does_not_make_the_next_ones_deaf(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is raised while an object is freed goes nowhere."""
    monkeypatch.setattr(sys, "unraisablehook", lambda lost: None)

    class Freed:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted), interruptible():
        Freed()
        for _ in range(2):  # the first ends it; were it deaf, neither would
            signal.raise_signal(signal.SIGTERM)
        raise AssertionError("it goes on")


def test_scratch_folders_of_dead_runs_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "moequant-scratch-of-mine").mkdir()
    child = os.fork()
    if not child:
        with scratch() as folder:
            (folder / "hidden").write_bytes(NEW)
            os._exit(0)
    os.waitpid(child, 0)
    assert len(names(tmp_path)) == 3, "the killed run left its folder"
    with scratch() as one, scratch() as two:
        assert names(tmp_path) == {"moequant-scratch-of-mine", one.name, two.name}, "the living are kept"
    assert names(tmp_path) == {"moequant-scratch-of-mine"}
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    refused(lambda: scratch().__enter__(), "no folder for temporary files .*; set TMPDIR")


@pytest.mark.parametrize("place", [atomic, atomic_folder, atomic_parts])
def test_an_error_calls_the_output_by_its_own_name(tmp_path: Path, place: Callable[..., Any]) -> None:
    """What is verified and checked lies under a temporary name."""
    out = tmp_path / "out.gguf"
    with pytest.raises(VerifyError) as error, place(out) as partial:
        raise VerifyError(f"{partial}: not its weights; {partial.name} was removed")
    assert str(error.value) == f"{out}: not its weights; out.gguf was removed"
