"""A process that dies before a chosen file operation: what it leaves is what a power cut would."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from moequant.files import rename

DEAD = 9

KERNELS = ("renameat2", "links and two steps")
"""Linux's own renames, and what stands in for them elsewhere."""

COUNTED = ("open", "os.", "shutil.", "fcntl.")
"""Audit events of file operations begin so; reading ones are counted too, which does no harm."""

IMPORTED = (sys.prefix, sys.base_prefix)
"""Where packages lie: modules are imported when they are needed, and that is no work of a command."""


@contextmanager
def on(kernel: str) -> Iterator[None]:
    """The renames of one of `KERNELS`."""
    with pytest.MonkeyPatch.context() as patch:
        if kernel != "renameat2":
            patch.setattr(rename, "renameat2", lambda old, new, flag: False)
        yield


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """A test under each of `KERNELS`."""
    with on(request.param):
        yield str(request.param)


@pytest.fixture(scope="module")
def struck(request: pytest.FixtureRequest) -> Iterator[Callable[..., None]]:
    """`small_process` of the module whose test asks."""
    with small_process(request.module.__name__) as call:
        yield call


@contextmanager
def small_process(module: str) -> Iterator[Callable[..., None]]:
    """What calls functions of `module` by name in one small process: each fork of a process with torch in it
    takes a tenth of a second, and there are hundreds."""
    with subprocess.Popen(
        [sys.executable, "-m", __name__, module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:

        def call(name: str, *arguments: object) -> None:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(json.dumps([name, *map(_plain, arguments)]) + "\n")
            process.stdin.flush()
            failed = json.loads(process.stdout.readline())
            assert failed is None, failed

        yield call
        process.communicate()


def _plain(argument: object) -> object:
    return os.fspath(argument) if isinstance(argument, os.PathLike) else argument


def _serve(module: str) -> None:
    """A line on stdout for every call: null, or how it failed."""
    cases = importlib.import_module(module)
    assert "torch" not in sys.modules, f"{module} is no small process"
    for asked in sys.stdin:
        name, *arguments = json.loads(asked)
        try:
            told = getattr(cases, name)(*arguments)
        except BaseException:
            told = traceback.format_exc()
        print(json.dumps(told), flush=True)


def killed_at_every_step(action: Callable[[], object], check: Callable[[int], None]) -> int:
    """Run `action` in forked processes, the first killed before its first file operation, and so on.

    `check` looks at what each left, before the next begins. Returns how many were killed.
    """
    for step in range(1, 10_000):
        child = os.fork()
        if not child:
            _run(action, step)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, DEAD), f"step {step}: the process failed by itself"
        if code == 0:
            return step - 1
        check(step)
    raise AssertionError("it never came to an end")


def _run(action: Callable[[], object], step: int) -> None:
    """In the child: never returns."""
    left = step

    def count() -> None:
        nonlocal left
        left -= 1
        if not left:
            os._exit(DEAD)

    try:
        watch(count)
        action()
        left = 0
        os._exit(0)
    except BaseException as error:
        left = 0
        print(repr(error), file=sys.stderr, flush=True)
    finally:
        os._exit(1)


def watch(count: Callable[[], object]) -> None:
    """Call `count` before every file operation of this process from now on."""

    def audited(event: str, args: object) -> None:
        if event.startswith(COUNTED) and not _of_import(args):
            count()

    def counted(function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object) -> object:
            count()
            return function(*args)

        return call

    # Python's own audit events know neither of these.
    os.fsync = counted(os.fsync)  # type: ignore[assignment]
    rename.renameat2 = counted(rename.renameat2)  # type: ignore[assignment]
    sys.addaudithook(audited)


def _of_import(args: object) -> bool:
    path = args[0] if isinstance(args, tuple) and args else None
    return isinstance(path, str) and (path.startswith(IMPORTED) or path.endswith((".py", ".pyc")))


if __name__ == "__main__":
    _serve(sys.argv[1])
