"""The library: what `import moequant` offers, as the README shows it."""

from __future__ import annotations

import dataclasses
import inspect
import json
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import moequant
from moequant import library
from moequant.checkpoint import open_checkpoint
from moequant.errors import OutputError
from moequant.progress import Progress
from moequant.report.shown import Shown
from moequant.values import Role
from scripts.build_library_reference import VERBS
from tests.cli.test_cli import run


def test_the_names_are_what_they_say() -> None:
    assert moequant.__all__ == ["MoequantError", "Settings", "convert"]
    for _ in range(2):
        assert callable(moequant.convert) and moequant.Settings(type="Q2_K").type == "Q2_K"


def test_importing_is_light() -> None:
    """Under 0.2 s of this processor's time, and neither torch nor tqdm is loaded."""
    code = (
        "import sys, time; start = time.process_time(); import moequant; "
        "took = time.process_time() - start; print(took); "
        "sys.exit('torch' in sys.modules or 'tqdm' in sys.modules or took > 0.2)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_convert_from_python(tiny, tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    settings = moequant.Settings("Q8_0", calib_tokens=2048, eval_tokens=1024, effort="fast")
    report = moequant.convert(str(tiny("olmoe")), str(out), settings)
    assert report.comparison is not None and report.comparison.kl_mean.value < 0.01
    assert report.out == out and report.file_bytes == out.stat().st_size
    assert "perplexity" in report.summary()


def test_every_verb_is_a_function_with_frozen_settings() -> None:
    for name in VERBS:
        verb = getattr(library, name)
        hints = typing.get_type_hints(verb)
        settings = [
            kind
            for key, kind in hints.items()
            if dataclasses.is_dataclass(kind) and key not in ("return", "model", "out", "base")
        ]
        assert all(kind.__dataclass_params__.frozen for kind in settings) and (settings or name == "inspect")
        returned = typing.get_origin(hints["return"]) or hints["return"]
        assert "progress" in hints and issubclass(returned, Shown)
        assert inspect.getdoc(verb), name


def test_a_result_is_shown_saved_and_followed(tiny, tmp_path: Path) -> None:
    """The same JSON as the command's, a page without a network, a table for a notebook; steps in order."""
    folder, steps = tiny("olmoe"), list[Progress]()
    out = tmp_path / "q.gguf"
    settings = library.Settings("Q8_0", calib_tokens=2048, eval_tokens=1024, effort="fast")
    report = library.convert(folder, out, settings, progress=steps.append)
    stages = list(dict.fromkeys(step.stage for step in steps))
    assert stages == ["open", "route", "calibrate", "quantize", "verify", "self-check", "compare"]
    ends = [step for step in steps if step.total is not None and step.done >= step.total]
    assert {step.stage for step in ends} >= {"quantize", "verify", "compare"}
    results = [report, library.inspect(out), library.check(out, library.CheckSettings(device="cpu"))]
    for result in results:
        for suffix in (".json", ".html", ".txt"):
            result.save(tmp_path / f"result{suffix}", overwrite=True)
        value = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
        assert value["schema"] == 1 and value["command"] == result.command
        page = (tmp_path / "result.html").read_text(encoding="utf-8")
        assert page.startswith("<!doctype html>") and str(tmp_path) not in page
        assert (tmp_path / "result.txt").read_text(encoding="utf-8") == result.summary()
        assert "<table>" in result._repr_html_() and "<html" not in result._repr_html_()
    done = run("inspect", out, "--json")
    assert done.stdout == results[1].to_json() + "\n"
    with pytest.raises(OutputError, match=r"saved as \.json, \.html, \.txt"):
        report.save(tmp_path / "report.pdf")
    with pytest.raises(OutputError, match="exists already"):
        report.save(tmp_path / "result.json")


def test_weights_are_counted_as_they_are_rounded(tiny, tmp_path: Path) -> None:
    """What a killed run had finished, and what is not rounded under a Hessian, says nothing of the time that
    the rest takes."""
    folder, out, steps = tiny("olmoe", num_experts=4), tmp_path / "q.gguf", list[Progress]()
    quick = {"calib_tokens": 1024, "eval_tokens": 0, "self_check": False}
    settings = library.Settings("Q4_0", tensor_type=(".=Q4_0",), **quick)
    weights = open_checkpoint(folder).weights
    free = sum(each.numel for each in weights if each.role is Role.EMBEDDING or each.site is None)
    first = free + sum(each.numel for each in weights if each.layer == 0 and each.site is not None)

    inside = set[float]()

    def stop(step: Progress) -> None:
        if step.stage == "quantize" and free < step.done < first and len([*tmp_path.rglob("part-*")]) == 1:
            inside.add(step.done)
        if step.stage == "quantize" and step.done > first:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        library.convert(folder, out, settings, progress=stop)
    assert len(inside) >= 3, "attention and experts of a layer, before all of it is there"
    library.convert(folder, out, settings, progress=steps.append)
    last = [step for step in steps if step.stage == "quantize" and step.total][-1]
    assert last.done == last.total and first <= last.given < last.total


def test_a_callback_that_raises_ends_the_run(tiny, tmp_path: Path) -> None:
    def stop(step: Progress) -> None:
        if step.stage == "verify":
            raise KeyboardInterrupt

    settings = library.Settings("Q8_0", calib_tokens=2048, eval_tokens=0, effort="fast")
    with pytest.raises(KeyboardInterrupt):
        library.convert(tiny("olmoe"), tmp_path / "q.gguf", settings, progress=stop)
    left = [path.name for path in tmp_path.iterdir()]
    assert left == ["q.gguf.journal"], "no half of a file, and from the journal the same call goes on"
