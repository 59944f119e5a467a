"""A Hub on loopback, and huggingface_hub turned towards it."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from moequant.checkpoint.folder import INDEX
from tests.hub.server import FIRST, Hub, serve

LITTER = ("model.py", "pytorch_model.bin", "original/model.safetensors", "consolidated.safetensors", "a.onnx")
"""What repositories have beside a model."""


def sharded(source: Path, folder: Path, shards: int = 3) -> Path:
    """A copy of a model in several files with an index."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, found = sorted(tensors), {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[number::shards]}
        save_file(part, folder / file)
        found |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": found}))
    return folder


@pytest.fixture(scope="session")
def published(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as a repository has it: shards, a card, and files that are none of the model's."""
    folder = sharded(tiny("qwen3_moe"), tmp_path_factory.mktemp("hub") / "model")
    for name in LITTER:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x" * 100_000)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return folder


@pytest.fixture
def hub(published: Path) -> Iterator[Hub]:
    """A server with that model."""
    with serve(Hub({FIRST: published})) as running:
        yield running


@pytest.fixture
def online(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """huggingface_hub asks that server and no other address; its cache, which is new."""
    cache = tmp_path / "cache"
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in {
        "ENDPOINT": hub.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(cache),
        "DOWNLOAD_CHUNK_SIZE": 1 << 16,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr("moequant.hub.client.WAIT", 0.01)
    connect = socket.socket.connect

    def only_here(self: socket.socket, address: Any) -> None:
        assert self.family == socket.AF_UNIX or address[0] == "127.0.0.1", address
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", only_here)
    return cache
