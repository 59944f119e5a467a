"""A process of its own for llama.cpp: its memory is the model's, and where it aborts, it alone ends."""

from __future__ import annotations

import sys
from pathlib import Path

import moequant

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


def command(module: str) -> list[str]:
    """The interpreter that calls `main` of a module of moequant, without the current folder on its path: that
    may be a stranger's, with a json.py.

    -I leaves out PYTHONPATH and the user's packages too; those that are in use here are searched last.
    """
    here = Path.cwd()
    used = [entry for entry in sys.path if Path(entry).is_absolute() and Path(entry).resolve() != here]
    return [sys.executable, "-I", "-c", _START, str(Path(moequant.__file__).parent), module, *used]
