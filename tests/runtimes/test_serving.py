"""The process that runs llama.cpp is this moequant, and nothing from the folder that it is started in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import moequant
from moequant.runtimes.llama_cpp import isolated, serving
from moequant.runtimes.llama_cpp.binding import LlamaError

HOSTILE = "import pathlib; pathlib.Path(__file__).with_name('ran').touch(); raise SystemExit('owned')"


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a model's, whose files are named like modules; every way to it is open."""
    for name in ("json", "numpy", "gguf", "moequant", "xllamacpp", "sitecustomize", "usercustomize"):
        (tmp_path / f"{name}.py").write_text(HOSTILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f":{tmp_path}:.")
    monkeypatch.setattr(sys, "path", ["", ".", str(tmp_path), *sys.path])
    return tmp_path


def test_nothing_in_the_current_folder_runs(hostile: Path) -> None:
    (hostile / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(LlamaError, match=r"model\.gguf: llama.cpp did not get through the prompts") as error:
        serving.serve(Path("model.gguf"), [serving.Prompt("one", "text")], 1, 1)
    assert "owned" not in str(error.value) and not (hostile / "ran").exists()


def test_modules_come_from_where_they_come_from_here(hostile: Path) -> None:
    """Also where moequant is a checkout that only PYTHONPATH leads to."""
    *python, start, package = isolated.command("moequant.errors")[:5]
    asked = "import json, numpy, moequant\nfor m in (moequant, json, numpy): print(m.__file__)\n"
    start = start.replace("importlib.import_module(sys.argv[2]).main()\n", asked)
    command = [*python, start, package, *isolated.command("moequant.errors")[5:]]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    here = subprocess.run(
        [sys.executable, "-I", "-c", "import json, numpy; print(json.__file__, numpy.__file__)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [moequant.__file__, *here.stdout.split()]
