"""Publishing a folder, with the real client against a Hub of our own on loopback."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError
from typer.testing import CliRunner

from moequant.cli import app
from moequant.errors import HubError, MoequantError, OutputError
from moequant.hub import publish
from moequant.hub.client import Unreachable
from moequant.hub.publish import PLACEHOLDER
from moequant.library import PushSettings, push
from moequant.progress import Progress
from moequant.report.shown import Result
from tests.cli.test_json import documented, naming
from tests.hub.server import FIRST, REPOSITORY, SECOND, Hub

# huggingface_hub's upload by LFS uses a parameter that httpx is about to give up.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")

HTTP = sys.modules[HfHubHTTPError.__bases__[0].__module__]
"""The library that huggingface_hub asks with: its versions use others."""

NEW = "me/Tiny-MoE-GGUF"

FILES = {
    "tiny-Q4_K_M.gguf": b"GGUF" + b"\1" * 5000,
    "README.md": b"---\nlicense: mit\n---\n# Tiny\n",
    "q.png": b"\2",
}

LEFT = ("tiny-Q8_0.gguf.journal/run.json", ".cache/x", ".tiny.gguf.moequant-00ff00ff")
"""What is kept of runs, and hidden files."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files as a conversion leaves them, beside what it keeps while it runs."""
    made = tmp_path / "made"
    for name, data in FILES.items() | {(name, b"{}") for name in LEFT}:
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_bytes(data)
    return made


@pytest.fixture(autouse=True)
def lfs(online: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large files go by LFS: Xet has a server of its own."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


def said(*arguments: object, given: str | None = None) -> Any:
    return CliRunner().invoke(app, ["push", *map(str, arguments)], input=given)


def written(hub: Hub) -> list[str]:
    """Requests that change something."""
    return [path for method, path, _ in hub.asked if method in ("POST", "PUT")]


def test_nothing_is_sent_unless_somebody_agrees(hub: Hub, folder: Path) -> None:
    done = said(NEW, folder, "--dry-run", "--yes")
    assert done.exit_code == 0 and "nothing was uploaded; --yes uploads" in done.stdout
    for shown in (
        *FILES,
        "a new repository, public",
        "5.00 kB",
        "stays here: .cache, .tiny.gguf.moequant-00ff00ff",
        "note: a conversion has not ended (tiny-Q8_0.gguf.journal)",
    ):
        assert shown in done.stdout, shown
    for asked in ([], ["--json"]):
        refused = said(NEW, folder, *asked)
        assert refused.exit_code == 1 and len(refused.stderr.splitlines()) == 1, "nobody can be asked"
        assert "nothing was uploaded" in refused.stderr and "--yes uploads without asking" in refused.stderr
    assert json.loads(refused.stdout)["error"]["kind"] == "HubError"
    assert push(NEW, folder).found.commit is None
    assert push(NEW, folder, agree=lambda planned: False).found.commit is None
    assert hub.asked and not written(hub), "it only looked"


def test_a_new_repository_gets_the_files_and_no_others(hub: Hub, folder: Path) -> None:
    done = said(NEW, folder, "--yes", "--private", "--message", "Four bits")
    assert done.exit_code == 0, done.output
    assert hub.received == FILES and hub.created == {NEW: True} and hub.parents == [None]
    assert done.stdout.index("README.md") < done.stdout.index(
        f"uploaded: {hub.endpoint}/{NEW}/commit/{SECOND}"
    )
    hub.received.clear()
    hub.asked.clear()
    value = json.loads(said(NEW, folder, "--yes", "--json").stdout)
    assert value["commit"] == SECOND and value.keys() - {"schema", "command"} == documented()["push"]
    assert not naming(str(folder.parent), value)
    assert hub.received == FILES and not [path for path in written(hub) if path.startswith("/lfs/")], (
        "they are there"
    )


def test_what_is_there_is_named_and_a_later_change_is_kept(hub: Hub, folder: Path) -> None:
    seen: list[Result[Any]] = []

    def changed(planned: Result[Any]) -> bool:
        seen.append(planned)
        hub.main = SECOND
        return True

    with pytest.raises(HubError, match="has changed since it was looked at"):
        push(REPOSITORY, folder, agree=changed)
    assert {each.name for each in seen[0].found.files if each.replaces} == {"README.md"}
    assert "replaces what is there" in seen[0].summary() and not hub.received
    hub.main = FIRST
    done = push(REPOSITORY, folder, agree=lambda planned: True)
    assert done.found.commit == SECOND and hub.parents == [FIRST] and not hub.created


def test_what_is_not_fit_to_publish_is_noted(hub: Hub, folder: Path) -> None:
    (folder / "README.md").write_text("---\n# base_model: OWNER/Tiny\n---\n")
    (folder / "out.json").write_text(json.dumps({"out": str(folder / "tiny.gguf")}))
    notes = "\n".join(push(NEW, folder).found.notes)
    assert (
        "README.md does not name the base model" in notes
        and "out.json names a folder of this machine" in notes
    )
    (folder / "README.md").unlink()
    assert "there is no README.md" in push(NEW, folder).summary()


def test_a_file_that_changes_after_it_was_shown_is_not_published(hub: Hub, folder: Path) -> None:
    def changed(planned: Result[Any]) -> bool:
        (folder / "README.md").write_bytes(FILES["README.md"].replace(b"Tiny", b"Tina"))
        return True

    with pytest.raises(OutputError, match=r"README\.md: has changed since it was shown"):
        push(NEW, folder, agree=changed)
    assert not hub.received and not hub.created

    def gone(planned: Result[Any]) -> bool:
        (folder / "q.png").unlink()
        return True

    with pytest.raises(OutputError, match=r"q\.png: has changed since it was shown"):
        push(NEW, folder, agree=gone)
    assert not hub.received


def test_links_are_named_or_stay(hub: Hub, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "secret.bin").write_bytes(b"s")
    (folder / "inner").symlink_to(tmp_path / "elsewhere")
    (folder / "link.bin").symlink_to(tmp_path / "elsewhere" / "secret.bin")
    (folder / "broken").symlink_to(tmp_path / "none")
    found = push(NEW, folder).found
    assert {each.name for each in found.files} == FILES.keys() | {"link.bin"}
    assert {"inner", "broken"} <= set(found.left_out)
    assert f"link.bin is a link: what is uploaded is {tmp_path / 'elsewhere' / 'secret.bin'}" in found.notes


def test_without_a_token_that_may_write(hub: Hub, folder: Path) -> None:
    hub.token = "secret"
    done = said(NEW, folder, "--yes")
    assert done.exit_code == 1 and "(401); log in with `hf auth login`" in done.stderr and not hub.received
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "place", "kind", "message"),
    [
        ("made", "a/b", HubError, "is no name of a repository on the Hub; write OWNER/NAME"),
        ("{folder}", "a/b", HubError, "the name comes first, then the folder"),
        ("a/b:c.gguf", "{folder}", HubError, "is no name of a repository"),
        (NEW, "{folder}/q.png", OutputError, "is a file; give the folder"),
        (NEW, "{folder}/none", OutputError, "no such folder"),
        (NEW, "{folder}/.cache/..", OutputError, None),
        (f"{NEW}@draft", "{folder}", HubError, "is not on the Hub, so it has no branch draft"),
        (f"{REPOSITORY}@draft", "{folder}", HubError, "has no branch draft"),
    ],
)
def test_refusals(
    folder: Path, name: str, place: str, kind: type[MoequantError], message: str | None
) -> None:
    given = (name.format(folder=folder), place.format(folder=folder))
    if message is None:
        assert push(*given).found.files
        return
    with pytest.raises(kind, match=message) as refused:
        push(*given)
    assert "\n" not in str(refused.value)


def test_a_public_repository_is_not_made_private_and_an_empty_folder_not_pushed(
    hub: Hub, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(OutputError, match="has no file to upload"):
        push(NEW, tmp_path / "empty")
    (tmp_path / "empty" / "a.txt").write_text("a")
    with pytest.raises(HubError, match="is there already and public"):
        push(REPOSITORY, tmp_path / "empty", PushSettings(private=True))


def test_offline_is_one_line(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE forbids"):
        push(NEW, folder)


def test_commands_of_the_card_that_lack_the_name_are_noted(hub: Hub, folder: Path) -> None:
    card = folder / "README.md"
    card.write_text(f"```sh\nollama run hf.co/{PLACEHOLDER}:tiny-Q4_K_M.gguf\n```\n")
    assert push(NEW, folder).found.notes[1:] == (
        f"README.md says {PLACEHOLDER}; put {NEW} there, so that its commands can be copied",
    )
    card.write_text(card.read_text().replace(PLACEHOLDER, NEW))
    assert not push(NEW, folder).found.notes[1:]


def test_a_run_that_did_not_end_is_noted_wherever_its_journal_lies(hub: Hub, tmp_path: Path) -> None:
    """A journal of the folder itself is kept beside it."""
    folder = tmp_path / "made"
    folder.mkdir()
    (folder / "README.md").write_bytes(FILES["README.md"])
    assert not push(NEW, folder).found.notes
    (tmp_path / "made.journal").mkdir()
    (folder / "sub" / "a.gguf.journal").mkdir(parents=True)
    inside, beside = push(NEW, folder).found.notes
    assert "(sub/a.gguf.journal)" in inside and "(made.journal)" in beside


@pytest.mark.parametrize(
    ("raised", "kind", "message"),
    [
        (RuntimeError("no such shard"), HubError, r"the upload failed \(RuntimeError: no such shard\)$"),
        (KeyError("oid"), HubError, r"the upload failed \(KeyError: 'oid'\)$"),
        (AssertionError(), HubError, r"the upload failed \(AssertionError\)$"),
        (ConnectionResetError("gone"), Unreachable, "the Hub cannot be reached"),
        (HTTP.ReadTimeout("slow"), Unreachable, "the Hub cannot be reached"),
    ],
)
def test_what_went_wrong_is_said(
    hub: Hub,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    raised: Exception,
    kind: type[HubError],
    message: str,
) -> None:
    """Only what is known to be the network's fault is called so."""

    def breaks(*given: Any, **named: Any) -> None:
        raise raised

    monkeypatch.setattr(HfApi, "create_commit", breaks)
    with pytest.raises(HubError, match=message) as error:
        push(NEW, folder, agree=lambda planned: True)
    assert type(error.value) is kind


def test_the_hub_that_is_gone_is_unreachable(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the real client says it."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(Unreachable, match="the Hub cannot be reached"):
        push(NEW, folder)


def test_hashing_is_counted_by_the_byte(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "CHUNK", 1000)
    steps: list[Progress] = []
    push(NEW, folder, agree=lambda planned: True, progress=steps.append)
    counted = [step for step in steps if step.stage == "hash"]
    total = sum(map(len, FILES.values()))
    assert counted[-1].done == counted[-1].total == total and counted[-1].unit == "B"
    assert len(counted) > len(FILES) + 4, "a large file is counted while it is read"
    assert {name: hashlib.sha256(data).hexdigest() for name, data in hub.stored.items()} == {
        name: name for name in hub.stored
    }
    assert hub.stored
