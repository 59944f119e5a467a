"""A model that is larger than the disk: what is kept, what is fetched again, and what is said beforehand."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moequant.checkpoint import load, open_checkpoint
from moequant.checkpoint.folder import INDEX
from moequant.errors import HubError
from moequant.hub.fetch import complete, headers, is_here
from moequant.hub.stream import announce, shelf_of, streamed
from tests.cli.test_cli import run
from tests.hub.server import FIRST, REPOSITORY, Hub


@pytest.fixture
def layered(tiny, tmp_path: Path, hub: Hub) -> Path:
    """The Hub's model with a file for each layer and one for the rest, as releases have them."""
    folder = Path(shutil.copytree(tiny("qwen3_moe"), tmp_path / "layered"))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    found = {
        name: f"model-{name.split('.')[2] if '.layers.' in name else 'rest'}.safetensors" for name in tensors
    }
    for file in set(found.values()):
        save_file({name: tensors[name] for name in tensors if found[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": found}))
    hub.commits[FIRST] = folder
    return folder


def largest(folder: Path) -> int:
    return max(file.stat().st_size for file in folder.glob("*.safetensors"))


def test_what_is_kept_and_what_is_fetched_again(
    hub: Hub, online: Path, layered: Path, caplog: pytest.LogCaptureFixture
) -> None:
    limit, there = largest(layered) + 1, open_checkpoint(layered)
    with streamed(headers(REPOSITORY), limit) as folder:
        model = open_checkpoint(folder)
        shelf = shelf_of(model)
        assert shelf is not None and is_here(folder) and complete(folder) is folder
        sent = hub.sent
        with caplog.at_level(logging.INFO, "moequant"):
            said = announce(model, passes=2)
        assert "2 passes over its layers fetch" in caplog.text and hub.sent == sent, "headers are there"
        for _ in range(2):
            for mine, own in zip(model.weights, there.weights, strict=True):
                assert torch.equal(load(mine), load(own))
                kept = sum(
                    file.stat().st_size for file in online.rglob("*.safetensors") if not file.is_symlink()
                )
                assert kept <= limit
        assert shelf.fetched == said > largest(layered) * 2
        with pytest.raises(HubError, match=r"one layer lies in files of .*; --stream"):
            announce_smaller(folder, limit)
    assert not list(online.rglob("*.safetensors")), "the shelf is gone with the run"


def announce_smaller(folder, limit: int) -> None:
    """The same with half a byte too few."""
    with streamed(headers(REPOSITORY), limit // 2) as smaller:
        announce(open_checkpoint(smaller), 1)


def test_with_room_for_all_nothing_is_fetched_twice(hub: Hub, online: Path, layered: Path) -> None:
    with streamed(headers(REPOSITORY), 10**9) as folder:
        model = open_checkpoint(folder)
        for _ in range(3):
            for weight in model.weights:
                load(weight)
        shelf = shelf_of(model)
        total = sum(file.stat().st_size for file in layered.glob("*.safetensors"))
        assert shelf is not None and shelf.fetched == total == announce(model, 3)


def test_what_lies_here_is_not_streamed(layered: Path) -> None:
    folder = headers(layered)
    with streamed(folder, 1) as same:
        assert same is folder and announce(open_checkpoint(same), 2) == 0


def test_a_conversion(
    hub: Hub, online: Path, layered: Path, text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The same bytes as from a folder, and as much fetched as was said."""
    fast = ("--type", "Q4_K_M", "--effort", "fast", "--calib", text, "--calib-tokens", 1024, "--eval", text)
    small = (*fast, "--eval-tokens", 1024)
    one, two = tmp_path / "one.gguf", tmp_path / "two.gguf"
    here = run("convert", layered, "-o", one, *small)
    assert here.returncode == 0, here.stderr
    limit = f"{largest(layered) + 1000}"
    with caplog.at_level(logging.INFO, "moequant"):
        away = run("convert", REPOSITORY, "-o", two, *small, "--stream", limit)
    assert away.returncode == 0, away.stderr
    (said,) = [each.args[2] for each in caplog.records if "passes over" in each.msg]  # type: ignore[index]
    (fetched,) = map(float, re.findall(r"streamed: ([\d.]+) GB", away.stdout))
    assert 0.9 * said <= fetched <= 1.1 * said
    assert not list(online.rglob("*.safetensors"))
    assert read(one) == read(two)


def read(path: Path) -> list[bytes]:
    """The data of every tensor of a file."""
    from moequant.containers.gguf.read import GgufFile

    file = GgufFile(path)
    return [file.data(name).tobytes() for name in file.tensors]
