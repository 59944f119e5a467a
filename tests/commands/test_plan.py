"""`moequant plan`: measured, drawn, written; refused before any work when it cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moequant.checkpoint import open_checkpoint
from moequant.containers.gguf.export import export
from moequant.plan import read
from moequant.statistics import store
from moequant.statistics.calibrate import calibrate
from tests.cli.test_cli import run
from tests.plan.test_measure import rows


@pytest.fixture(scope="module")
def model(tiny) -> Path:
    return tiny("mixtral", num_hidden_layers=1)


def test_one_run_measures_writes_and_draws(model: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out, picture = tmp_path / "plan.json", tmp_path / "curve.svg"
    done = run(
        "plan", model, "--sizes", "1M", "-o", out, "--curve", picture, "--calib", text, "--effort", "fast"
    )
    assert done.returncode == 0, done.stderr
    assert "at most 1M" in done.stdout and "probes of" in done.stdout and "IQ3_XXS" in done.stdout
    assert picture.read_text().lstrip().startswith("<?xml")
    plan = read(out, export(open_checkpoint(model)).weights)
    assert plan.target == "at most 1M" and plan.kl is not None
    assert json.loads(out.read_text())["predicted_kl"] == plan.kl


def test_statistics_replace_the_calibration_pass(model: Path, text: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(model)
    stats = tmp_path / "stats.safetensors"
    store.save(stats, store.stored(checkpoint, calibrate(checkpoint, rows(4))))
    done = run("plan", model, "--stats", stats, "--calib", text, "--no-probes", "--effort", "fast")
    assert done.returncode == 0, done.stderr
    assert "sensitivities from tables" in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--sizes", "10k"], "smallest possible file has"),
        (["--sizes", "1M,lots"], "size 'lots'"),
        (["--type", "Q9_Z"], "unknown type 'Q9_Z'"),
        (["--sizes", "1M,2M", "-o", "plan.json"], "holds one plan, 2 were asked for"),
        (["--curve", "curve.jpg"], "pictures are .png"),
        (["--bpw", "0.5"], "smallest possible plan has"),
    ],
)
def test_refused_in_one_line_before_anything_is_measured(
    model: Path, tmp_path: Path, monkeypatch, options: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("plan", model, "--calib", "no such text", *options)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1 and says in done.stderr, done.stderr
