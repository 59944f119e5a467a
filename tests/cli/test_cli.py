"""The command line: one line and a non-zero exit for bad input, nothing half-written, quiet in a pipe."""

from __future__ import annotations

import logging
import os
import pty
import re
import resource
import shlex
import shutil
import subprocess
import sys
import termios
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import moequant
from moequant.cli import app
from moequant.commands.journal import GOES_ON
from moequant.text import bundled
from tests import models

SMALL = {
    "num_hidden_layers": 1,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts": 4,
}


@dataclass(frozen=True)
class Finished:
    returncode: int
    stdout: str
    stderr: str


def run(*arguments: object) -> Finished:
    """The command in this process; what is not an error on purpose is a failure of the test."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Finished(result.exit_code, result.stdout, result.stderr)


@pytest.fixture
def model(tiny, tmp_path: Path) -> Path:
    """A copy of a small model for a test to damage."""
    return Path(shutil.copytree(tiny("qwen3_moe"), tmp_path / "model"))


def refused(out: Path, *arguments: object, says: str) -> None:
    """The command fails with one line on stderr, no traceback, and leaves no file behind."""
    before = set(out.parent.iterdir())
    result = run("convert", *arguments, "-o", out)
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert result.returncode == 1, result.stderr
    assert len(lines) == 1 and lines[0].startswith("moequant: "), result.stderr
    assert re.search(says, lines[0]), lines[0]
    assert set(out.parent.iterdir()) == before


def test_convert_and_its_dry_run_agree_to_the_byte(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "q.gguf"
    fast = "convert", model, "-o", out, "--type", "Q3_K_M", "--effort", "fast"
    dry = run(*fast, "--dry-run")
    assert dry.returncode == 0 and not out.exists()
    assert "layers.1.experts.down" in dry.stdout
    done = run(*fast, "--calib", text, "--eval", text, "--details")
    assert done.returncode == 0, done.stderr
    assert f"{out.stat().st_size:,} bytes" in dry.stdout
    assert "perplexity" in done.stdout and "worst-hit experts" in done.stdout
    assert done.stderr == "", "progress bars are for terminals"


def test_a_measured_plan_stays_below_what_the_dry_run_says(tiny, text: Path, tmp_path: Path) -> None:
    out, model = tmp_path / "q.gguf", tiny("qwen3_moe", **SMALL, moe_intermediate_size=256)
    wanted = "convert", model, "-o", out, "--bpw", "5.5", "--calib", text, "--calib-tokens", 1024
    dry = run(*wanted, "--dry-run")
    found = re.search(r"at most ([0-9,]+) +bytes", " ".join(dry.stdout.split()))
    assert found is not None, dry.stdout
    done = run(*wanted, "--eval-tokens", "0")
    assert done.returncode == 0, done.stderr
    assert out.stat().st_size <= int(found[1].replace(",", ""))
    assert done.stderr == ""


def test_the_dry_run_reads_only_headers(model: Path, tmp_path: Path) -> None:
    """Weights that are not there are not missed: behind the header the file is a hole."""
    file = model / "model.safetensors"
    size = file.stat().st_size
    with file.open("r+b") as handle:
        handle.truncate(8 + int.from_bytes(file.read_bytes()[:8], "little"))
        handle.truncate(size)
    assert run("convert", model, "-o", tmp_path / "q.gguf", "--dry-run").returncode == 0


def test_the_dry_run_says_what_the_report_would_note(tiny, tmp_path: Path) -> None:
    dry = run("convert", tiny("llama"), "-o", tmp_path / "q.gguf", "--dry-run")
    assert dry.returncode == 0 and "note: a dense model" in dry.stdout, dry.stdout[-500:]


def test_best_says_first_what_its_gradients_take(tiny, text: Path, tmp_path: Path) -> None:
    out, model = tmp_path / "q.gguf", tiny("qwen3_moe", **SMALL)
    wanted = "convert", model, "-o", out, "--calib", text, "--calib-tokens", 1024, "--type", "Q8_0"
    # Types are pinned, so that none is measured.
    done = run(*wanted, "--tensor-type", ".=Q8_0", "--effort", "best", "--eval-tokens", 0)
    assert done.returncode == 0, done.stderr
    said = (
        r"moequant: effort best: a backward pass over 1,024 tokens .* float32, [0-9.]+ GB, about [0-9]+ s\n"
    )
    assert re.fullmatch(said, done.stderr), done.stderr


def test_best_has_nothing_to_say_where_nothing_is_rounded(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "f.gguf"
    done = run("convert", model, "-o", out, "--type", "F16", "--effort", "best", "--eval-tokens", 0)
    assert done.returncode == 0 and done.stderr == "" and out.exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("demo", "--type", "Q9"), "unknown type 'Q9'; known: F32, BF16"),
        (
            ("inspect", "{here}/file.txt"),
            "not a GGUF file (it starts with other bytes); give one, or a model folder",
        ),
        (
            ("convert", "{here}/file.txt", "-o", "{here}/x.gguf"),
            "is a file; give the folder with config.json",
        ),
        (("convert", "{here}", "-o", "{here}/x.gguf"), "give the one that has config.json and"),
        (("convert", "Qwen3-30B", "-o", "{here}/x.gguf"), "or OWNER/NAME of a model on the Hub"),
        (("convert", "demo", "-o", "{here}/x.gguf", "--type", "q4_k_m"), "did you mean Q4_K_M?"),
        (("convert", "demo", "-o", "{here}/x.gguf", "--type", "zz"), "known: F32, BF16"),
        (("convert", "demo", "-o", "{here}/x.gguf", "--size", "14"), "at most 14 bytes: the smallest"),
        (("convert", "demo", "-o", "{here}/x.gguf", "--ram", "64"), "is 64 bytes; write 64GiB"),
        (("convert", "demo", "-o", "{here}/x.gguf", "--tensor-type", "down=Q6"), "did you mean Q6_K?"),
        (
            ("route", "demo", "--merge", "{here}/none"),
            "no such file; give one that `moequant route -o` wrote",
        ),
    ],
)
def test_what_newcomers_type_is_answered_with_what_to_do(
    tmp_path: Path, arguments: tuple[str, ...], says: str
) -> None:
    (tmp_path / "file.txt").write_text("words")
    place = {"demo": str(bundled.path("demo"))}
    given = [
        arguments[0],
        *(place.get(each, each).replace("{here}", str(tmp_path)) for each in arguments[1:]),
    ]
    done = run(*given, *(["--dry-run"] if given[0] == "convert" else []))
    assert done.returncode == 1 and says in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1 and [each.name for each in tmp_path.iterdir()] == ["file.txt"]


def test_an_existing_output_is_kept(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "q.gguf"
    out.write_text("precious")
    refused(out, model, "--calib", text, says="--overwrite")
    assert out.read_text() == "precious"
    fast = "--effort", "fast", "--eval-tokens", 0
    done = run("convert", model, "-o", out, "--calib", text, *fast, "--overwrite")
    assert done.returncode == 0 and out.read_bytes()[:4] == b"GGUF"
    second, *_ = (line for line in done.stdout.splitlines()[1:] if line.strip())
    assert re.match(r"Q4_K_M, \d\.\d\d bits: (no|\d+) experts? unseen; (none|\d+) hurt", second), second
    assert "worst-hit" not in done.stdout and "peak memory" not in done.stdout, "for --details"
    start, compare = [line.strip() for line in done.stdout.rstrip().splitlines()[-2:]]
    assert start == f"llama-server -m {out} -c 1024"
    assert shlex.split(compare) == [
        "moequant",
        "compare",
        str(model),
        str(out),
        "--html",
        "compare.html",
    ], "one line each, however long"


def test_a_failed_overwrite_keeps_the_old_file(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "q.gguf"
    out.write_text("precious")
    poison(model, "model.layers.1.mlp.experts.3.down_proj.weight", float("inf"))
    refused(out, model, "--calib", text, "--overwrite", says="down_proj")
    assert out.read_text() == "precious"


def poison(model: Path, name: str, value: float) -> None:
    file = model / "model.safetensors"
    tensors = load_file(file)
    tensors[name][0, 1] = value
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(model: Path, text: Path, tmp_path: Path, value: float) -> None:
    name = "model.layers.0.mlp.experts.5.gate_proj.weight"
    poison(model, name, value)
    refused(tmp_path / "q.gguf", model, "--calib", text, says=name)
    refused(tmp_path / "q.gguf", model, "--type", "BF16", "--eval-tokens", 0, says=name)


def test_broken_models(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "q.gguf"
    refused(out, tmp_path / "nowhere", says="no such file or folder; give a model folder")
    refused(out, model, "--type", "Q9_K", says="unknown type .Q9_K.; did you mean Q")
    (model / "tokenizer.json").rename(model / "hidden")
    refused(out, model, "--calib", text, says="tokenizer.json")
    (model / "hidden").rename(model / "tokenizer.json")
    models.edit_config(model, architectures=["NoSuchForCausalLM"])
    refused(out, model, says="NoSuchForCausalLM")


def test_truncated_and_missing_shards(tiny, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny("qwen3_moe", save={"max_shard_size": "300KB"}), tmp_path / "sharded"))
    last = sorted(folder.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-10])
    refused(tmp_path / "q.gguf", folder, says=f"{last.name}.*truncated")
    last.unlink()
    refused(tmp_path / "q.gguf", folder, says=f"{last.name} is missing")


def test_bad_calibration_text(model: Path, tmp_path: Path) -> None:
    out, text = tmp_path / "q.gguf", tmp_path / "t.txt"
    text.write_text("too short")
    refused(out, model, "--calib", text, says="t.txt")
    text.write_bytes(b"\x00\xff\xfe\x80" * 1000)
    refused(out, model, "--calib", text, says="t.txt.*UTF-8")
    refused(out, model, "--calib", tmp_path / "absent.txt", says="absent.txt")


def test_bad_outputs(model: Path, tmp_path: Path) -> None:
    refused(tmp_path / "model.bin", model, says=r"\.gguf")
    result = run("convert", model, "-o", tmp_path / "no" / "such" / "q.gguf")
    assert result.returncode == 1 and "no such folder" in result.stderr
    result = run("convert", model, "-o", "/proc/q.gguf")
    assert result.returncode == 1 and result.stderr.count("\n") == 1 and "/proc" in result.stderr


def test_a_disk_that_fills_up_half_way_leaves_what_is_finished(
    model: Path, text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The kernel refuses to let files grow past a limit, as a full disk would."""
    limit, out = resource.getrlimit(resource.RLIMIT_FSIZE), tmp_path / "out" / "q.gguf"
    out.parent.mkdir()
    calib = ("--calib", text, "--calib-tokens", "1024", "--eval-tokens", "0")
    arguments = ("convert", model, *calib, "--type", "Q8_0", "--effort", "fast", "-o", out)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_100_000, limit[1]))
    try:
        result = run(*arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1
    assert re.search(r"cannot be written .*\(" + re.escape(GOES_ON), result.stderr)
    assert [path.name for path in out.parent.iterdir()] == ["q.gguf.journal"]
    with caplog.at_level(logging.INFO, "moequant"):
        result = run(*arguments)
    assert result.returncode == 0 and "continues after the work that is finished there" in caplog.text
    assert [path.name for path in out.parent.iterdir()] == ["q.gguf"]


def test_help_and_version() -> None:
    assert run("--version").stdout.strip() == f"moequant {moequant.__version__}"
    shown = run("convert", "--help").stdout
    for option in (
        "--type",
        "--calib",
        "--calib-tokens",
        "--eval",
        "--seed",
        "--effort",
        "--dry-run",
        "--overwrite",
    ):
        assert option in shown
    assert run().returncode != 0


def test_demo_replaces_no_file_unasked(tmp_path: Path) -> None:
    """That it writes one is on the page quickstart, which tests/test_docs.py runs."""
    out = tmp_path / "demo.gguf"
    out.write_text("precious")
    done = run("demo", "-o", out, "--effort", "fast")
    assert done.returncode == 1 and "demo.gguf: exists already" in done.stderr
    assert out.read_text() == "precious"


def test_a_person_sees_bars_and_then_the_report(tiny, text: Path, tmp_path: Path) -> None:
    """As a person starts it: progress bars on the terminal, the report on stdout."""
    out, model = tmp_path / "q.gguf", tiny("qwen3_moe", num_hidden_layers=1)
    tokens = ["--calib", text, "--calib-tokens", "1024", "--eval", text, "--eval-tokens", "1024"]
    command = [sys.executable, "-m", "moequant", "convert", model, "-o", out, "--effort", "fast", *tokens]
    terminal, stderr = pty.openpty()
    termios.tcsetwinsize(stderr, (24, 100))
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True) as process:
        os.close(stderr)
        shown = threading.Thread(target=_drain, args=(terminal, seen := []))
        shown.start()
        stdout = process.stdout.read()
    shown.join()
    assert process.returncode == 0, seen
    assert "perplexity" in stdout and out.read_bytes()[:4] == b"GGUF"
    bars = b"".join(seen).decode()
    for stage in ("calibrate", "quantize", "verify", "compare"):
        assert f"{stage}:" in bars


def _drain(terminal: int, seen: list[bytes]) -> None:
    """Everything written to the terminal until its last writer is gone."""
    try:
        while chunk := os.read(terminal, 4096):
            seen.append(chunk)
    except OSError:  # how Linux says that the other end is closed
        os.close(terminal)


def test_modules_of_the_current_folder_are_not_imported(model: Path, tmp_path: Path) -> None:
    """`python -m` looks there first."""
    for name in ("json", "logging", "numpy", "torch", "typer", "rich", "safetensors", "tokenizers", "gguf"):
        (model / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r})\n")
    ran = subprocess.run(
        [sys.executable, "-m", "moequant", "inspect", str(model)],
        cwd=model,
        env=os.environ | {"PYTHONPATH": str(models.ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert not (tmp_path / "ran").exists(), (tmp_path / "ran").read_text()
