"""`moequant route`: tables, files, merging; one line and nothing half-written for bad input."""

from __future__ import annotations

import json
import re
import resource
import signal
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader

from moequant.checkpoint import open_checkpoint
from moequant.statistics import store
from moequant.values import Calibration
from tests import models
from tests.cli.test_cli import Finished, run
from tests.forks import python
from tests.statistics import starving


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts 6 and 7 of both layers are never chosen."""
    return starving.never_chosen(tmp_path_factory.mktemp("starved"), dead=2)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calib.jsonl"
    domains = {"prose": models.TEXT[0], "code": models.TEXT[1], "numbers": models.TEXT[2]}
    path.write_text(
        "\n".join(json.dumps({"domain": name, "text": line * 90}) for name, line in domains.items())
    )
    return path


def refused(folder: Path, *arguments: object, says: str) -> None:
    """One line on stderr, no traceback, no file more than before."""
    before = set(folder.iterdir())
    result = run("route", *arguments)
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert result.returncode == 1, result.stderr
    assert len(lines) == 1 and lines[0].startswith("moequant: ") and re.search(says, lines[0]), result.stderr
    assert result.stdout == "" and set(folder.iterdir()) == before


def routed(*arguments: object) -> Finished:
    result = run("route", *arguments)
    assert result.returncode == 0, result.stderr
    assert result.stderr == "", "progress bars are for terminals"
    return result


def loaded(model: Path, stats: Path) -> Calibration:
    """The statistics, once they are known to be this model's."""
    checkpoint, found = open_checkpoint(model), store.load(stats)
    store.check(checkpoint, found)
    return found.calibration


def test_everything_at_once(model: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out, matrix, picture = (tmp_path / name for name in ("s.safetensors", "i.gguf", "h.svg"))
    done = routed(
        model,
        "-o",
        out,
        "--calib",
        text,
        "--calib-tokens",
        2048,
        "--imatrix-out",
        matrix,
        "--picture",
        picture,
    )
    assert "routed 2,048 tokens of: " in done.stdout.replace("\n", " ")
    assert "4 experts saw no token (layer.expert): 0.6, 0.7, 1.6, 1.7" in done.stdout
    assert all(name in done.stdout for name in ("prose", "code", "numbers", "max / mean", "hottest"))
    found = loaded(model, out)
    assert found.tokens == 2048 and [route.tokens[6:].tolist() for route in found.routes] == [[0, 0]] * 2
    counts = {tensor.name: tensor.data for tensor in GGUFReader(matrix).tensors}
    assert (
        counts["blk.1.ffn_up_exps.weight.counts"].reshape(-1)[:6].tolist()
        == found.routes[1].tokens[:6].tolist()
    )
    assert "2,048 routed" in picture.read_text()
    assert set(tmp_path.iterdir()) == {out, matrix, picture}


def test_the_same_command_gives_the_same_bytes(model: Path, text: Path, tmp_path: Path) -> None:
    files = [tmp_path / "one", tmp_path / "two"]
    for file in files:
        routed(model, "-o", file, "--calib", text, "--calib-tokens", 1024)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_merged_parts_are_one_run(model: Path, text: Path, tmp_path: Path) -> None:
    """Text split over two machines: rows of the prose on one, the rest on the other."""
    lines = text.read_text().splitlines()
    parts = []
    for index, some in enumerate((lines[:1], lines[1:])):
        part = tmp_path / f"{index}.jsonl"
        part.write_text("\n".join(some))
        parts.append(tmp_path / f"{index}.safetensors")
        routed(model, "-o", parts[-1], "--calib", part, "--calib-tokens", 1024)
    done = routed(model, "-o", tmp_path / "both", "--merge", parts[0], "--merge", parts[1])
    assert "routed 2,048 tokens" in done.stdout
    found, one, two = (store.load(path).calibration for path in (tmp_path / "both", *parts))
    assert found.domains == tuple(dict.fromkeys(one.domains + two.domains)) and found.rows == 4
    name = "layers.1.experts.inner"
    torch.testing.assert_close(
        found.inputs[name].moment, one.inputs[name].moment + two.inputs[name].moment, rtol=1e-12, atol=0
    )
    more = routed(model, "--merge", parts[0], "--calib", text, "--calib-tokens", 1024, "--json")
    assert json.loads(more.stdout)["tokens"] == 2048, "with --calib text is routed too"


def test_json(model: Path, text: Path) -> None:
    value = json.loads(routed(model, "--calib", text, "--calib-tokens", 1024, "--json").stdout)
    assert [layer["dead"] for layer in value["layers"]] == [[6, 7], [6, 7]]
    assert [sum(layer["expert_tokens"]) for layer in value["layers"]] == [2048, 2048]
    assert "coverage" not in value


def test_feeding_starved_experts(model: Path, text: Path) -> None:
    """Nobody can feed experts 6 and 7: the budget is spent on trying, and they are named."""
    arguments = (model, "--calib", text, "--calib-tokens", 1024, "--min-tokens-per-expert", 0.5)
    done = routed(*arguments, "--max-tokens", 3072)
    shown = " ".join(done.stdout.split())
    assert "each expert was to see 128 tokens" in shown and "stopped: budget" in shown
    assert "routed 3,072 tokens" in shown
    assert re.search(r"experts stay starved, layer.expert \(tokens\): .*0\.6 \(0\), 0\.7 \(0\)", shown)
    value = json.loads(routed(*arguments, "--json").stdout)["coverage"]
    assert sum(value["rows"].values()) == 8, "four times --calib-tokens unless told otherwise"
    assert {"layer": 1, "expert": 7, "tokens": 0} in value["starved"]


def test_outputs_are_kept_and_looked_at_first(model: Path, text: Path, tmp_path: Path) -> None:
    old = tmp_path / "s"
    old.write_text("precious")
    absent = tmp_path / "absent.txt"
    # The text is missing too: the complaint about the output comes before anybody looks for it.
    for option in ("-o", "--imatrix-out"):
        refused(tmp_path, model, "--calib", absent, option, old, says="s: exists already.*--overwrite")
    assert old.read_text() == "precious"
    refused(tmp_path, model, "--calib", absent, "-o", tmp_path / "no" / "s", says="no such folder")
    refused(tmp_path, model, "--calib", absent, "-o", tmp_path, says="is a folder")
    refused(tmp_path, model, "--calib", absent, "--picture", tmp_path / "h.gif", says=r"h\.gif: pictures are")
    both = tmp_path / "x"
    refused(tmp_path, model, "--calib", absent, "-o", both, "--imatrix-out", both, says="one name for two")
    refused(tmp_path, model, "--calib", absent, "-o", both, says="absent.txt: no such file")
    routed(model, "--calib", text, "--calib-tokens", 1024, "-o", old, "--overwrite")
    assert store.load(old).calibration.tokens == 1024


def test_statistics_that_do_not_fit(model: Path, text: Path, tiny, tmp_path: Path) -> None:
    part = tmp_path / "part"
    routed(model, "-o", part, "--calib", text, "--calib-tokens", 1024)
    out = tmp_path / "out"
    refused(tmp_path, model, "-o", out, "--merge", part, "--merge", part, says="named twice")
    refused(tmp_path, tiny("mixtral"), "-o", out, "--merge", part, says="part: statistics of another model")
    part.write_bytes(part.read_bytes()[:-1])
    refused(tmp_path, model, "-o", out, "--merge", part, says="part: cannot be read as statistics")
    refused(tmp_path, model, "-o", out, "--merge", tmp_path / "gone", says="gone: no such file")


def test_a_dense_model_has_moments_but_no_routers(tiny, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = tiny("llama")
    shown = routed(
        folder, "--calib", text, "--calib-tokens", 1024, "--min-tokens-per-expert", 1, "-o", tmp_path / "s"
    ).stdout
    assert "there are no routers" in shown
    assert loaded(folder, tmp_path / "s").routes == ()
    refused(tmp_path, folder, "--calib", text, "--picture", tmp_path / "h.png", says="a dense model")


def test_broken_models_and_texts(model: Path, tmp_path: Path) -> None:
    refused(tmp_path, tmp_path / "nowhere", says="no such file or folder")
    junk = tmp_path / "junk.txt"
    junk.write_bytes(b"\x00\xff" * 500)
    refused(tmp_path, model, "--calib", junk, says="junk.txt.*UTF-8")


def test_help_names_every_option() -> None:
    shown = run("route", "--help").stdout
    for option in ("--calib-tokens", "--min-tokens-per", "--merge", "--imatrix-out", "--picture", "--json"):
        assert option in shown


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(tiny, tmp_path: Path) -> None:
    """The command killed inside the second layer, run again: the file of an undisturbed run."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(models.TEXT) * 4, encoding="utf-8")
    arguments = [str(tiny("qwen3_moe")), "--calib", str(text), "--calib-tokens", "2048"]
    killed = (
        "import os, signal, sys\n"
        "from moequant.statistics import moments\n"
        "routed, seen = moments.Moments.routed, []\n"
        "def count(self, *args):\n"
        "    seen.append(0)\n"
        "    if len(seen) > 1: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return routed(self, *args)\n"
        "moments.Moments.routed = count\n"
        "from moequant.cli import app\n"
        "app(sys.argv[1:])\n"
    )
    out, whole = tmp_path / "killed.safetensors", tmp_path / "whole.safetensors"
    assert python("-c", killed, "route", *arguments, "-o", out).returncode == -signal.SIGKILL
    assert not out.exists() and list(tmp_path.glob("killed.safetensors.journal/*/layer-*"))
    for path in (out, whole):
        result = run("route", *arguments, "-o", path)
        assert result.returncode == 0, result.stderr
    assert out.read_bytes() == whole.read_bytes()
    assert not list(tmp_path.glob("*.journal"))


def test_a_folder_beside_the_statistics_that_is_not_a_journal_is_kept(
    model: Path, text: Path, tmp_path: Path
) -> None:
    arguments = (model, "--calib", text, "--calib-tokens", 1024, "-o", tmp_path / "s")
    journal = tmp_path / "s.journal"
    journal.mkdir()
    (journal / "diary").write_text("mine")
    refused(tmp_path, *arguments, says="diary: is not of a journal and is kept")
    (journal / "diary").rename(tmp_path / "diary")
    journal.rmdir()
    (tmp_path / "elsewhere").mkdir()
    journal.symlink_to("elsewhere")
    refused(tmp_path, *arguments, says=r"s\.journal: is not of a journal and is kept")
    assert not list((tmp_path / "elsewhere").iterdir()) and (tmp_path / "diary").read_text() == "mine"


def test_another_text_leaves_an_interrupted_run_alone(model: Path, text: Path, tmp_path: Path) -> None:
    run_folder = tmp_path / "s.journal" / ("0" * 16)
    run_folder.mkdir(parents=True)
    (run_folder / "run.json").write_text("{}")
    routed(model, "--calib", text, "--calib-tokens", 1024, "-o", tmp_path / "s")
    assert list(run_folder.parent.iterdir()) == [run_folder]
    assert list(run_folder.iterdir()) == [run_folder / "run.json"]


def test_the_weights_that_are_read_are_never_replaced(model: Path, text: Path, tmp_path: Path) -> None:
    before = (model / "model.safetensors").read_bytes()
    arguments = (model, "--calib", text, "--calib-tokens", 1024, "--overwrite")
    for option in ("-o", "--imatrix-out", "--picture"):
        refused(tmp_path, *arguments, option, model / "model.safetensors", says="is read by this run")
    assert (model / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("room", [10, 3000])
def test_a_run_that_finished_no_layer_leaves_nothing(
    model: Path, text: Path, tmp_path: Path, room: int
) -> None:
    """The disk is full before the state of the run is written, or with the first hidden states."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limit[1]))
    try:
        out = tmp_path / "s.safetensors"
        refused(tmp_path, model, "--calib", text, "--calib-tokens", "1024", "-o", out, says="s.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
