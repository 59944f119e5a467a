"""`moequant plan`: measured, drawn, written; refused before any work when it cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moequant.checkpoint import load, open_checkpoint
from moequant.containers.folders import compressed_tensors
from moequant.containers.folders.plan import KEPT
from moequant.containers.gguf.export import export
from moequant.plan import read
from moequant.statistics import store
from moequant.statistics.calibrate import calibrate
from tests.cli.test_cli import run
from tests.containers.folders.cases import own_decoder
from tests.plan.test_measure import rows

FOLDER = ("--format", "safetensors")


@pytest.fixture(scope="module")
def model(tiny) -> Path:
    return tiny("mixtral", num_hidden_layers=1)


def test_one_run_measures_writes_and_draws(model: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out, picture = tmp_path / "plan.json", tmp_path / "curve.svg"
    wanted = ("--sizes", "1M", "-o", out, "--curve", picture)
    # With so little memory hidden states lie on the disk and experts come some at a time.
    done = run("plan", model, *wanted, "--calib", text, "--effort", "fast", "--ram", "64K")
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


def test_a_folder_is_planned_and_then_made_of_its_plan(tiny, text: Path, tmp_path: Path) -> None:
    """Every weight has the scheme of the plan in the folder, as compressed-tensors itself reads it."""
    model, out, folder = tiny("mixtral"), tmp_path / "plan.json", tmp_path / "folder"
    checkpoint = open_checkpoint(model)
    size = round(0.45 * checkpoint.source_bytes)
    asked = ("--sizes", size, "-o", out, "--calib", text, "--calib-tokens", 4096, "--effort", "fast")
    done = run("plan", model, "--format", "safetensors", *asked, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["format"] == "safetensors" and "probes of" in told["predicted_from"]
    (wanted,) = told["wanted"]
    assert told["curve"][0]["bytes"] < wanted["bytes"] <= size < told["curve"][-1]["bytes"]
    assert {"W4A16", "NVFP4A16"} <= {row["preset"] for row in told["presets"]}
    planned = {row["weight"]: row["format"] for row in wanted["types"]}
    assert {row["weight"]: row["format"] for row in json.loads(out.read_text())["choices"]} == planned
    assert len(set(planned.values()) - set(KEPT)) > 1, "more than one scheme"

    made = ("--format", "safetensors", "--plan", out, "--effort", "fast", "--eval-tokens", 0)
    done = run("convert", model, "-o", folder, *made, "--calib", text, "--calib-tokens", 4096, "--json")
    assert done.returncode == 0, done.stderr
    (file,) = json.loads(done.stdout)["files"]
    assert {row["weight"]: row["format"] for row in file["types"]} == planned
    assert sum(each.stat().st_size for each in folder.glob("*.safetensors")) == wanted["bytes"]
    theirs, ours = compressed_tensors.open_folder(folder), own_decoder(folder)
    for weight in checkpoint.weights:
        assert torch.equal(theirs.load(weight), ours.load(weight))
        assert torch.equal(theirs.load(weight), load(weight)) is (planned[weight.name] in KEPT)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--sizes", "10k"], "smallest possible file has"),
        (["--sizes", "1M,lots"], "size 'lots'"),
        (["--type", "Q9_Z"], "unknown type 'Q9_Z'"),
        (["--sizes", "1M,2M", "-o", "plan.json"], "holds one plan, 2 were asked for"),
        (["--curve", "curve.jpg"], "pictures are .png"),
        (["--bpw", "0.5"], "smallest possible plan has"),
        (["--schemes", "W4A16"], "--schemes does not go with --format gguf; it is for a folder"),
        (["--tp", "2"], "--tp does not go with --format gguf"),
        ([*FOLDER, "--bpw", "4"], "--bpw does not go with --format safetensors; a folder is planned by"),
        ([*FOLDER, "--type", "Q4_K_M"], "--type does not go with --format safetensors"),
        ([*FOLDER, "--tensor-type", "down=Q8_0"], "--tensor-type does not go with --format safetensors"),
        ([*FOLDER, "--sizes", "10k"], "the smallest folder of W4A16_G32,"),
        ([*FOLDER, "--schemes", "W4"], "--schemes W4: no such scheme; there are W2A16"),
        ([*FOLDER, "--schemes", "FP8_BLOCK", "--gpu", "7.5"], "--gpu 7.5: none of FP8_BLOCK runs below"),
        ([*FOLDER, "--tp", "3"], "--tp 3 does not divide"),
        ([*FOLDER, "--sizes", "1M,2M", "-o", "plan.json"], "holds one plan, 2 were asked for"),
    ],
)
def test_refused_in_one_line_before_anything_is_measured(
    model: Path, tmp_path: Path, monkeypatch, options: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("plan", model, "--calib", "no such text", *options)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1 and says in done.stderr, done.stderr
