"""Commands that are given a name of the Hub."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import pytest

from moequant.containers.gguf.read import read_header
from tests.cli.test_cli import run
from tests.hub.server import FIRST, REPOSITORY, Hub

FAST = ("--type", "Q4_K_M", "--effort", "fast", "--eval-tokens", "0", "--no-self-check")


def weights_sent(hub: Hub) -> list[str]:
    """Files of weights that were asked for from their first byte to their last."""
    return [path for method, path, span in hub.asked if method == "GET" and "model-0" in path and not span]


def test_from_a_name_to_a_file(hub: Hub, online: Path, tiny, text: Path, tmp_path: Path) -> None:
    """What a person does: look, ask what fits, try, convert, compare. Weights come only where they must."""
    seen = run("inspect", REPOSITORY, "--json")
    assert seen.returncode == 0, seen.stderr
    there = json.loads(run("inspect", tiny("qwen3_moe"), "--json").stdout)
    here = json.loads(seen.stdout)
    assert (
        here["parameters"] == there["parameters"] and here["roles"] == there["roles"] and not here["missing"]
    )
    fits = run("fit", REPOSITORY, "--vram", "2G", "--ram", "8G", "--ctx", 512)
    assert f"moequant convert {REPOSITORY} -o Tiny-MoE-" in fits.stdout, fits.stderr
    out = tmp_path / "tiny.gguf"
    dry = run("convert", REPOSITORY, "-o", out, *FAST, "--dry-run")
    assert dry.returncode == 0 and f"{REPOSITORY} as Q4_K_M" in dry.stdout, dry.stderr
    assert not weights_sent(hub) and not list(online.rglob("*.safetensors"))
    made = run("convert", REPOSITORY, "-o", out, *FAST, "--calib", text)
    assert made.returncode == 0, made.stderr
    assert f"{REPOSITORY} → tiny.gguf" in made.stdout and FIRST in made.stdout
    assert len(weights_sent(hub)) == 3
    header = read_header(out)
    assert header.text("general.name") == "Tiny MoE" and header.text("moequant.source.revision") == FIRST
    assert f"{out.stat().st_size:,} bytes" in dry.stdout
    assert gguf.GGUFReader(out).get_field("general.source.huggingface.repository").contents() == REPOSITORY
    shown = run("compare", REPOSITORY, out, "--eval", text, "--eval-tokens", 1024, "--json")
    assert shown.returncode == 0, shown.stderr
    assert FIRST in shown.stdout and len(weights_sent(hub)) == 3, "the cache has them"


def test_a_model_that_does_not_convert_is_not_downloaded(
    hub: Hub, online: Path, published: Path, tmp_path: Path
) -> None:
    odd = shutil.copytree(published, tmp_path / "odd")
    config = json.loads((odd / "config.json").read_text()) | {"surprise": 1}
    (odd / "config.json").write_text(json.dumps(config))
    hub.commits[FIRST] = odd
    done = run("convert", REPOSITORY, "-o", tmp_path / "x.gguf", *FAST)
    assert done.returncode == 1 and "surprise" in done.stderr and not weights_sent(hub)


def test_check_takes_a_file_of_a_repository(
    hub: Hub, online: Path, published: Path, text: Path, tmp_path: Path
) -> None:
    (tmp_path / "files").mkdir()
    made = run("convert", published, "-o", tmp_path / "files" / "tiny-Q4_K_M.gguf", *FAST, "--calib", text)
    assert made.returncode == 0, made.stderr
    hub.commits[FIRST] = tmp_path / "files"
    seen = run("inspect", f"{REPOSITORY}:tiny-Q4_K_M.gguf", "--json")
    assert seen.returncode == 0, seen.stderr
    value = json.loads(seen.stdout)
    assert (value["path"], value["revision"]) == (f"{REPOSITORY}:tiny-Q4_K_M.gguf", FIRST)
    assert (
        value["roles"]
        == json.loads(run("inspect", tmp_path / "files/tiny-Q4_K_M.gguf", "--json").stdout)["roles"]
    )
    spans = [span for method, _, span in hub.asked if method == "GET" and span]
    assert spans == ["bytes=0-1048575"] and not list(online.rglob("*.gguf")), "its header alone"
    done = run("check", f"{REPOSITORY}:tiny-Q4_K_M.gguf", "--device", "cpu")
    assert done.returncode == 0 and f"{REPOSITORY}:tiny-Q4_K_M.gguf" in done.stdout, done.stderr
    assert str(tmp_path) not in done.stdout


@pytest.mark.parametrize("offline", ["0", "1"])
def test_the_command_in_a_process_of_its_own(hub: Hub, tmp_path: Path, offline: str) -> None:
    """As a person runs it: the Hub's address and the cache from the environment, nothing else changed."""
    env = os.environ | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_OFFLINE": offline,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HOME": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-m", "moequant", "inspect", REPOSITORY, "--json"],
        env=env, cwd=tmp_path, text=True, capture_output=True, timeout=300, check=False,
    )  # fmt: skip
    if offline == "1":
        assert done.returncode == 1 and not hub.asked
        assert len(done.stderr.splitlines()) == 1 and "HF_HUB_OFFLINE forbids" in done.stderr
    else:
        assert done.returncode == 0 and not done.stderr, done.stderr
        assert json.loads(done.stdout)["experts"] == 8 and not weights_sent(hub)
