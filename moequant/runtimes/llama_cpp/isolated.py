"""A process of its own for llama.cpp: its memory is the model's, and where it aborts, it alone ends."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import moequant
from moequant.runtimes.llama_cpp.binding import LlamaError, cause

_START = """
import importlib, importlib.util, pathlib, sys
package = pathlib.Path(sys.argv[1])
sys.path += sys.argv[3:]
spec = importlib.util.spec_from_file_location("moequant", package / "__init__.py")
sys.modules["moequant"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
importlib.import_module(sys.argv[2]).main()
"""
"""Imports this very moequant by its place: the folder it lies in is not searched for anything else."""


def ask(module: str, job: Mapping[str, Any], failed: str) -> bytes:
    """What `main` of a module of moequant answers to a job, in a process of its own. LlamaError begins with
    `failed` and ends with what llama.cpp said, when it refuses or aborts."""
    done = subprocess.run(command(module), input=json.dumps(job).encode(), capture_output=True, check=False)
    if done.returncode != 0:
        said = cause(done.stderr.decode(errors="replace"))
        raise LlamaError(f"{failed} ({said or f'it ended with {done.returncode}'})")
    return done.stdout


def command(module: str) -> list[str]:
    """The interpreter that calls `main` of a module of moequant, without the current folder on its path: that
    may be a stranger's, with a json.py.

    -I leaves out PYTHONPATH and the user's packages too; those that are in use here are searched last.
    """
    here = Path.cwd()
    used = [entry for entry in sys.path if Path(entry).is_absolute() and Path(entry).resolve() != here]
    return [sys.executable, "-I", "-c", _START, str(Path(moequant.__file__).parent), module, *used]
