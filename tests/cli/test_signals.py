"""A run that a signal ends: one line, the exit code that shells expect, and nothing but what is finished."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import models

WAITING = """
import os, signal, sys, time
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
from moequant.cli import app
app(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("number", "format_"),
    [(signal.SIGINT, "gguf"), (signal.SIGTERM, "safetensors"), (signal.SIGHUP, "gguf")],
)
def test_a_conversion_ends_clean(tiny, tmp_path: Path, number: signal.Signals, format_: str) -> None:
    out, text = tmp_path / "out" / "q.gguf", tmp_path / "t.txt"
    out.parent.mkdir()
    text.write_text("\n".join(models.TEXT) * 2, encoding="utf-8")
    command = ["convert", tiny("qwen3_moe", num_hidden_layers=1), "-o", out, "--format", format_]
    options = ["--calib", text, "--eval-tokens", "0", "--effort", "fast"]
    if format_ == "safetensors":
        options += ["--bits", "8", "--group-size", "64"]
    with subprocess.Popen(
        [sys.executable, "-c", WAITING, *map(str, command), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "writing\n", process.stderr.read()
        assert len(list(out.parent.iterdir())) == 3, "a lock, a temporary and the journal"
        process.send_signal(number)
        stderr = process.stderr.read()
    assert process.returncode == 128 + number
    kept = "finished work is kept: give the same command again to continue"
    assert stderr == f"moequant: ended by {number.name}; {kept}\n"
    assert [path.name for path in out.parent.iterdir()] == ["q.gguf.journal"]
