"""The bundled data: found where it may lie, exactly what its manifest says, nothing in both splits."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moequant.errors import CorpusError
from moequant.text import bundled
from tests.models import ROOT

CALIB = ROOT / "calib"
SCRIPT = ROOT / "scripts/build_calib_manifest.py"
SPLITS: dict[bundled.Split, str] = {"calibration": "text", "evaluation": "eval"}


def entries(split: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads((CALIB / "manifest.json").read_text("utf-8"))["splits"][
        split
    ]
    return found["domains"]


def build(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True, cwd=ROOT)


def test_a_wheel_is_looked_at_before_a_checkout(tmp_path: Path) -> None:
    package = tmp_path / "moequant"
    (tmp_path / "calib").mkdir()
    package.mkdir()
    with pytest.raises(CorpusError, match=r"_bundled/calib: the bundled calib data is missing; reinstall"):
        bundled.path("calib", package)
    (tmp_path / "pyproject.toml").touch()
    assert bundled.path("calib", package) == tmp_path / "calib"
    (package / "_bundled/calib").mkdir(parents=True)
    assert bundled.path("calib", package) == package / "_bundled/calib"


def test_this_installation_has_its_data() -> None:
    assert (bundled.path("calib") / "manifest.json").is_file()
    assert (bundled.path("demo") / "config.json").is_file()


@pytest.mark.parametrize("split", SPLITS)
def test_every_domain_has_the_bytes_and_the_hash_of_the_manifest(split: bundled.Split) -> None:
    for domain, entry in entries(split).items():
        folder = CALIB / SPLITS[split] / domain
        assert entry["files"] == sorted(file.name for file in folder.iterdir())
        data = b"".join((folder / file).read_bytes() for file in entry["files"])
        assert len(data) == entry["bytes"], domain
        assert hashlib.sha256(data).hexdigest() == entry["sha256"], domain


@pytest.mark.parametrize("split", SPLITS)
def test_every_folder_is_in_the_manifest(split: bundled.Split) -> None:
    assert entries(split).keys() == {
        folder.name for folder in (CALIB / SPLITS[split]).iterdir() if folder.is_dir()
    }


def test_the_set_is_wide_and_long_enough() -> None:
    calibration, evaluation = entries("calibration"), entries("evaluation")
    sizes = [entry["bytes"] for entry in calibration.values()]
    assert len(sizes) >= 16
    assert sum(sizes) >= 180_000
    assert calibration.keys() == evaluation.keys()


def test_no_document_and_no_long_line_is_in_both_splits() -> None:
    parts = {split: [text for texts in bundled.texts(split).values() for text in texts] for split in SPLITS}
    assert not set(parts["calibration"]) & set(parts["evaluation"])
    lines = [
        {line for text in texts for line in text.splitlines() if len(line) > 40} for texts in parts.values()
    ]
    assert min(map(len, lines)) > 300
    assert not lines[0] & lines[1]


def test_the_manifest_is_what_its_script_writes() -> None:
    result = build("--check")
    assert result.returncode == 0, result.stderr


def test_the_prompts_are_four_kinds_and_what_the_manifest_says(copy: Path) -> None:
    found = bundled.prompts()
    assert list(found) == ["easy", "average", "long", "malformed"]
    assert len(found["long"]) > 20 * len(found["average"])
    assert "\x1b" in found["malformed"] and "\ufffd" in found["malformed"]
    (copy / "prompts/easy.txt").write_text("another")
    with pytest.raises(CorpusError, match="prompt easy is not what the manifest says"):
        bundled.prompts(copy)
    assert "is out of date" in build("--check", "--root", str(copy)).stderr


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(CALIB, tmp_path / "calib"))


def test_an_altered_or_missing_file_is_noticed(copy: Path) -> None:
    assert bundled.texts("calibration", copy) == bundled.texts("calibration")
    file = next((copy / "text/python").iterdir())
    # What a version control system does to line ends, for one.
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    with pytest.raises(CorpusError, match=r"calibration domain python is \d+ bytes .* expected \d+ "):
        bundled.texts("calibration", copy)
    assert "is out of date" in build("--check", "--root", str(copy)).stderr
    file.unlink()
    with pytest.raises(CorpusError, match=r"text/python: bundled text is unreadable"):
        bundled.texts("calibration", copy)
    (copy / "manifest.json").write_text("{")
    with pytest.raises(CorpusError, match=r"manifest\.json: the manifest of the bundled text is unreadable"):
        bundled.texts("calibration", copy)


def test_the_script_describes_what_is_there(copy: Path) -> None:
    (copy / "text/python/zz.txt").write_text("print('one more')\n")
    assert build("--root", str(copy)).returncode == 0
    assert bundled.texts("calibration", copy)["python"][-1] == "print('one more')\n"
    assert bundled.texts("evaluation", copy) == bundled.texts("evaluation")


def test_the_script_refuses_text_in_both_splits(copy: Path) -> None:
    before = (copy / "manifest.json").read_bytes()
    line = max(next((copy / "text/news").iterdir()).read_text("utf-8").splitlines(), key=len)
    (copy / "eval/news/zz.txt").write_text(f"Other words first.\n{line}\n", encoding="utf-8")
    result = build("--root", str(copy))
    assert result.returncode == 1
    assert "in both splits" in result.stderr
    assert (copy / "manifest.json").read_bytes() == before
