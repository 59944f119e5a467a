"""`python("-m", "moequant", …)`: what `python -m moequant …` does, in a process that need not import first.

A new process takes five seconds to import torch and transformers. Here one that has imported them forks,
before torch has started a thread. Tests of what a process imports, of how the interpreter is started, of
variables that are read while modules are imported, and of memory need one that is new.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from tests.models import ROOT

INTERPRETED = "TRITON_INTERPRET"
"""What Triton reads while it is imported: processes with it are forks of another server."""


@dataclass(slots=True)
class Server:
    """The process that forks; it ends when its input does."""

    process: subprocess.Popen[str]

    def told(self) -> int:
        """A number that it prints."""
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())

    def start(self, arguments: list[str], env: Mapping[str, str], cwd: Path, says: Path) -> int:
        """The id of a new process; what it prints goes to `stdout` and `stderr` in the folder `says`."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([arguments, dict(env), str(cwd), str(says)]) + "\n")
        self.process.stdin.flush()
        return self.told()


_servers: dict[bool, Server] = {}


def server(interprets: bool = False) -> Server:
    """The one of this session, started when it is first needed."""
    if interprets not in _servers:
        env = os.environ | ({INTERPRETED: "1"} if interprets else {})
        given, pipe = [sys.executable, "-m", __name__], subprocess.PIPE
        process = subprocess.Popen(given, stdin=pipe, stdout=pipe, text=True, cwd=ROOT, env=env)
        _servers[interprets] = Server(process)
    return _servers[interprets]


def close() -> None:
    """No more processes."""
    for each in _servers.values():
        each.process.communicate()


def python(
    *arguments: object, env: Mapping[str, str] | None = None, cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """How Python with these arguments ends."""
    given = [os.fspath(each) if isinstance(each, os.PathLike) else str(each) for each in arguments]
    env = os.environ if env is None else env
    with tempfile.TemporaryDirectory() as folder:
        says, forks = Path(folder), server(env.get(INTERPRETED) == "1")
        forks.start(given, env, cwd, says)
        code = forks.told()
        told = [(says / name).read_text(encoding="utf-8") for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess(given, code, *told)


def _serve() -> None:
    """For every line on stdin, the number of the process that it starts, and how that ended."""
    import tests.preloaded  # noqa: F401  before the forks

    for line in sys.stdin:
        child = os.fork()
        if not child:
            _run(*json.loads(line))
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _run(arguments: list[str], env: dict[str, str], cwd: str, says: str) -> NoReturn:
    """In the child: what the interpreter does with its arguments."""
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, name in enumerate(("stdout", "stderr"), 1):
            os.dup2(os.open(Path(says, name), os.O_WRONLY | os.O_CREAT, 0o600), number)
        os.environ.clear()
        os.environ.update(env)
        os.chdir(cwd)
        _main(*arguments)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _main(kind: str, *rest: str) -> None:
    """`-c CODE …`, `-m MODULE …` or `SCRIPT …`."""
    if kind == "-c":
        code, *rest_ = rest
        sys.argv = [kind, *rest_]
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    elif kind == "-m":
        sys.argv = list(rest)
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [kind, *rest]
        sys.path.insert(0, str(Path(kind).resolve().parent))
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    _serve()
