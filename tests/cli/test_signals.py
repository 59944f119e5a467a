"""A run that a signal ends: one line, the exit code that shells expect, and nothing but what is finished."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import models
from tests.forks import server

WAITING = """
import os, signal, sys, time
from moequant.cli import app
from moequant.containers.folders import write as folder
from moequant.containers.gguf import write as file

def forever(*args):
    print("writing", flush=True)
    try:
        time.sleep(60)
    finally:
        os.kill(os.getpid(), signal.SIGINT)  # a second one must not cut the cleaning short

file.write = folder.write = forever
for each in (signal.SIGINT, signal.SIGHUP):  # tests that run in the background inherit them as ignored
    signal.signal(each, signal.SIG_DFL)
app(sys.argv[1:])
"""
"""A command that waits when it has begun to write."""


@pytest.fixture(scope="module")
def model(tiny) -> Path:
    return tiny("qwen3_moe", num_hidden_layers=1)


@pytest.mark.parametrize(
    ("number", "format_"),
    [(signal.SIGINT, "gguf"), (signal.SIGTERM, "safetensors"), (signal.SIGHUP, "gguf")],
)
def test_a_conversion_ends_clean(model: Path, tmp_path: Path, number: signal.Signals, format_: str) -> None:
    out, text, begun = tmp_path / "out" / "q.gguf", tmp_path / "t.txt", tmp_path / "stdout"
    out.parent.mkdir()
    text.write_text("\n".join(models.TEXT) * 2, encoding="utf-8")
    command = ["convert", model, "-o", out, "--format", format_]
    options = ["--calib", text, "--calib-tokens", "1024", "--eval-tokens", "0", "--effort", "fast"]
    options += ["--type", "Q8_0"] if format_ == "gguf" else ["--bits", "8", "--group-size", "64"]
    given = [str(each) for each in ("-c", WAITING, *command, *options)]
    child = server().start(given, os.environ, models.ROOT, tmp_path)
    until = time.monotonic() + 120
    while not (begun.exists() and begun.read_text()) and time.monotonic() < until:
        time.sleep(0.02)
    assert begun.read_text() == "writing\n", (tmp_path / "stderr").read_text()
    assert len(list(out.parent.iterdir())) == 3, "a lock, a temporary and the journal"
    os.kill(child, number)
    assert server().told() == 128 + number
    kept = "finished work is kept: give the same command again to continue"
    assert (tmp_path / "stderr").read_text() == f"moequant: ended by {number.name}; {kept}\n"
    assert [path.name for path in out.parent.iterdir()] == ["q.gguf.journal"]


EARLY = """
class Strike:
    def find_spec(self, name, *rest):
        if name == "moequant.cli":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Strike())
"""
LATE = "atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))"


@pytest.mark.parametrize("strike", [EARLY, LATE], ids=["while it starts", "when it has ended"])
def test_around_a_command_a_signal_leaves_no_traceback(strike: str) -> None:
    """As of any other program: there is nothing to clean up."""
    begin = "import atexit, os, signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code = f"{begin}{strike}\nfrom moequant.__main__ import main\nmain()"
    done = subprocess.run(
        [sys.executable, "-c", code, "--version"],
        capture_output=True,
        text=True,
        check=False,
        cwd=models.ROOT,
    )
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")
