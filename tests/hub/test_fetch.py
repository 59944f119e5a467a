"""Names of the Hub, with the real client against a Hub of our own on loopback."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from moequant.checkpoint import Folder, load, open_checkpoint
from moequant.errors import CheckpointError, HubError
from moequant.hub import HubModel, located, named
from moequant.hub.fetch import complete, headers, is_here, whole
from moequant.hub.ranges import RemoteFile
from tests.hub.conftest import LITTER
from tests.hub.server import FIRST, REPOSITORY, SECOND, Hub


@pytest.mark.parametrize(
    ("text", "repository", "revision", "file"),
    [
        ("Qwen/Qwen3-30B-A3B", "Qwen/Qwen3-30B-A3B", None, None),
        ("a/b@v1.0", "a/b", "v1.0", None),
        ("a/b@refs/pr/1:x/y-Q4_K_M.gguf", "a/b", "refs/pr/1", "x/y-Q4_K_M.gguf"),
    ],
)
def test_names(text: str, repository: str, revision: str | None, file: str | None) -> None:
    found = HubModel.parse(text)
    assert found == HubModel(repository, revision, file) and str(found) == text


@pytest.mark.parametrize(
    "text", ["a", "./a/b", "/a/b", "a/b/c", "a//b", "a/..", "a/b--c", "a/b:c.bin", "~/b", "models/x.gguf"]
)
def test_what_no_model_is_called_is_a_path(text: str) -> None:
    assert located(text) == Path(text)


def test_a_folder_of_that_name_wins(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert located(REPOSITORY) == HubModel(REPOSITORY)
    shutil.copytree(published, tmp_path / REPOSITORY)
    monkeypatch.chdir(tmp_path)
    assert located(REPOSITORY) == Path(REPOSITORY)
    assert isinstance(located(Path("not/there")), Path), "a Path is never a name"


def read_all(folder: Folder) -> dict[str, torch.Tensor]:
    """Every weight of a model."""
    return {weight.name: load(weight) for weight in open_checkpoint(folder).weights}


def test_headers_alone_take_a_few_bytes(hub: Hub, online: Path, published: Path) -> None:
    found = headers(REPOSITORY)
    there = open_checkpoint(published)
    here = open_checkpoint(found)
    assert [w.name for w in here.weights] == [w.name for w in there.weights]
    assert (here.repository, here.revision) == (REPOSITORY, FIRST)
    weights = sum(file.bytes for file in found.weights.values())
    small = sum(file.stat().st_size for file in found.path.iterdir())
    assert hub.sent < small + 3 * (1 << 16) + 10_000 and weights > 20 * 3 * (1 << 16)
    assert not is_here(found) and not list(found.path.glob("*.safetensors"))


def test_a_range_is_the_numbers_themselves(hub: Hub, online: Path, published: Path) -> None:
    there = read_all(headers(published))
    for name, values in read_all(headers(REPOSITORY)).items():
        assert torch.equal(values, there[name]), name


def test_a_whole_model_and_nothing_else(hub: Hub, online: Path, published: Path) -> None:
    found = complete(headers(REPOSITORY))
    assert is_here(found) and found.path.parent.name == "snapshots" and found.path.name == FIRST
    names = {file.relative_to(published).as_posix() for file in published.rglob("*") if file.is_file()}
    assert set(hub.names()) == names - set(LITTER)
    assert {name for name in names if (found.path / name).is_file()} == names - set(LITTER)
    for name in found.weights:
        assert (found.path / name).read_bytes() == (published / name).read_bytes()
    asked = len(hub.asked)
    assert whole(f"{REPOSITORY}@{FIRST}") == found.path
    assert len([each for each in hub.asked[asked:] if each[0] == "GET" and "/resolve/" in each[1]]) == 0


def test_a_cut_download_goes_on(hub: Hub, online: Path, published: Path) -> None:
    hub.cut = 4
    found = whole(REPOSITORY)
    for file in published.glob("model-*.safetensors"):
        assert (found / file.name).read_bytes() == file.read_bytes()
    begun = [
        span for method, _, span in hub.asked if method == "GET" and span and not span.startswith("bytes=0-")
    ]
    assert begun, "from where it stopped"


def test_a_cut_range_goes_on(hub: Hub, online: Path, published: Path) -> None:
    hub.cut = 2
    assert len(open_checkpoint(headers(REPOSITORY)).weights) == len(open_checkpoint(published).weights)


def test_a_connection_that_always_ends(hub: Hub, online: Path) -> None:
    hub.cut = 10_000
    with pytest.raises(HubError, match=r"acme/Tiny-MoE.*(reached|ended)"):
        headers(REPOSITORY)
    assert len(hub.asked) < 60


def test_a_server_without_ranges(hub: Hub, online: Path) -> None:
    hub.ranges = False
    with pytest.raises(HubError, match=r"does not send parts of files"):
        headers(REPOSITORY)
    assert hub.sent < 10_000_000


@pytest.mark.parametrize(
    ("status", "code", "says"),
    [
        (401, "GatedRepo", "is gated; ask for access .* HF_TOKEN"),
        (403, "GatedRepo", "is gated"),
        (401, "", "or there is no such model; use `hf auth login` or HF_TOKEN"),
        (404, "RepoNotFound", "no such folder here, and no such model on the Hub"),
        (404, "RevisionNotFound", "has no revision"),
        (500, "", "the Hub refuses it"),
    ],
)
def test_refusals(hub: Hub, online: Path, status: int, code: str, says: str) -> None:
    hub.status, hub.code = status, code
    for ask in (headers, whole):
        with pytest.raises(HubError, match=says) as error:
            ask(f"{REPOSITORY}@v9" if code == "RevisionNotFound" else REPOSITORY)
        assert "\n" not in str(error.value)


def test_a_token_opens_a_gated_model(hub: Hub, online: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "hf_secret"
    with pytest.raises(HubError, match="gated"):
        headers(REPOSITORY)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert headers(REPOSITORY).weights


def test_sizes_that_are_not_true(hub: Hub, online: Path) -> None:
    hub.longer = 1000
    with pytest.raises(HubError, match=r"Tiny-MoE: ") as error:
        whole(REPOSITORY)
    assert "\n" not in str(error.value)


def test_a_revision_that_moves(hub: Hub, online: Path, published: Path, tmp_path: Path) -> None:
    """What was looked up first is what is read to the end; the next run sees the new one."""
    newer = tmp_path / "newer"
    shutil.copytree(published, newer)
    (newer / "generation_config.json").write_text("{}")
    hub.commits[SECOND] = newer
    found = headers(REPOSITORY)
    hub.main = SECOND
    assert complete(found).path.name == FIRST
    assert not [path for _, path, _ in hub.asked if SECOND in path]
    again = whole(REPOSITORY)
    assert again.name == SECOND and (again / "generation_config.json").read_text() == "{}"
    assert whole(f"{REPOSITORY}@{FIRST}").name == FIRST


def test_offline(hub: Hub, online: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"neither a folder here nor in .*HF_HUB_OFFLINE"):
        headers(REPOSITORY)
    assert not hub.asked
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    path = whole(REPOSITORY)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert whole(REPOSITORY) == path == headers(REPOSITORY).path
    assert is_here(headers(REPOSITORY))


def test_half_a_model_offline_is_said_to_be_half(
    hub: Hub, online: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers(REPOSITORY)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"shard model-.* is missing .* is the download complete"):
        open_checkpoint(headers(REPOSITORY))


def test_nobody_answers(online: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match="is no folder here, and the Hub cannot be reached"):
        headers(REPOSITORY)


def test_a_disk_that_is_too_small(hub: Hub, online: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 1_000_000))
    with pytest.raises(
        HubError, match=r"[1-9][\d.]* [kM]B are still to download .* 1\.00 MB free; --cache-dir"
    ):
        whole(REPOSITORY)
    assert not [name for name in hub.names() if name.endswith(".safetensors")]


def test_another_cache(hub: Hub, online: Path, tmp_path: Path) -> None:
    path = whole(HubModel(REPOSITORY, cache=tmp_path / "elsewhere"))
    assert path.is_relative_to(tmp_path / "elsewhere") and not online.exists()
    assert named(HubModel(REPOSITORY, FIRST)) == f"{REPOSITORY}@{FIRST}"


def test_an_index_that_names_what_is_not_there(
    hub: Hub, online: Path, published: Path, tmp_path: Path
) -> None:
    hub.commits[FIRST] = shutil.copytree(published, tmp_path / "half")
    next((tmp_path / "half").glob("model-00002*")).unlink()
    with pytest.raises(HubError, match=r"model-00002-of-00003.safetensors is in .*index.json but not among"):
        headers(REPOSITORY)


def test_a_header_longer_than_its_file(hub: Hub, online: Path, published: Path, tmp_path: Path) -> None:
    hub.commits[FIRST] = shutil.copytree(published, tmp_path / "odd")
    next((tmp_path / "odd").glob("model-00002*")).write_bytes(b"\xff" * 1000)
    with pytest.raises(HubError, match="no safetensors file"):
        headers(REPOSITORY)


def test_one_gguf_file(hub: Hub, online: Path, published: Path, tmp_path: Path) -> None:
    hub.commits[FIRST] = tmp_path / "files"
    (tmp_path / "files").mkdir()
    parts = [f"x-0000{number}-of-00002.gguf" for number in (1, 2)]
    for name in (*parts, "y.gguf"):
        (tmp_path / "files" / name).write_bytes(name.encode())
    found = whole(f"{REPOSITORY}:{parts[0]}")
    assert [file.read_bytes() for file in sorted(found.parent.iterdir())] == [name.encode() for name in parts]
    with pytest.raises(HubError, match=r"has no file z.gguf; it has x-00001-of-00002.gguf, "):
        whole(f"{REPOSITORY}:z.gguf")
    with pytest.raises(HubError, match=r"no config.json, .* acme/Tiny-MoE:FILE.gguf"):
        headers(REPOSITORY)
    with pytest.raises(HubError, match="without a file"):
        headers(f"{REPOSITORY}:y.gguf")


def test_a_remote_file_is_read_from_anywhere(hub: Hub, online: Path, published: Path) -> None:
    name, file = next(iter(headers(REPOSITORY).weights.items()))
    assert isinstance(file, RemoteFile) and str(file) == f"{REPOSITORY}: {name}"
    data = (published / name).read_bytes()
    with file.open() as opened:
        for at in (0, 7, len(file.head) - 3, len(file.head), len(data) - 5):
            opened.seek(at)
            assert opened.read(100) == data[at : at + 100]
        assert opened.read(1) == b"" and opened.tell() == len(data)
