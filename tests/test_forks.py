"""A forked process is what a new one would be: arguments, surroundings, what it prints and how it ends."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from tests.forks import python

CODE = """
import os, sys
print(sys.argv, os.environ.get("A"), os.environ.get("B"), os.getcwd(), sys.stdin.read())
sys.exit(sys.argv[1])
"""


def test_it_ends_as_a_new_one_would(tmp_path: Path) -> None:
    os.environ["B"] = "left out"
    try:
        done = python("-c", CODE, "said", env={"A": "given"}, cwd=tmp_path)
    finally:
        del os.environ["B"]
    assert done.returncode == 1 and done.stderr == "said\n"
    assert done.stdout == f"['-c', 'said'] given None {tmp_path} \n"
    assert python("-c", "import sys; sys.exit(3)").returncode == 3
    assert python("-c", "import os; os.kill(os.getpid(), 9)").returncode == -signal.SIGKILL
    failed = python("-c", "1 / 0")
    assert failed.returncode == 1 and failed.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_modules_and_scripts_run(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("NAME = 'beside'\n")
    (tmp_path / "script.py").write_text("import beside, sys\nprint(__name__, beside.NAME, sys.argv[1:])\n")
    assert python(tmp_path / "script.py", 1).stdout == "__main__ beside ['1']\n"
    assert "beside" not in sys.modules
    shown = python("-m", "moequant", "--version")
    assert shown.returncode == 0 and shown.stdout.startswith("moequant ") and not shown.stderr
    assert python("-m", "moequant", "inspect", tmp_path / "nothing").returncode == 1


def test_there_is_one_thread() -> None:
    """Locks that another one held would be held for ever."""
    imported = "'transformers.modeling_utils' in sys.modules"
    code = f"import os, sys; print(len(os.listdir('/proc/self/task')), {imported})"
    assert python("-c", code).stdout == "1 True\n"
