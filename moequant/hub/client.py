"""The one place that reads from the Hub, through huggingface_hub; what goes wrong is a HubError."""

from __future__ import annotations

import glob
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from moequant import __version__
from moequant.errors import HubError, MoequantError, one_line
from moequant.hub.names import HubModel

TRIES = 4
"""So often a range is asked for before the connection is given up."""

WAIT = 1.0
"""Seconds before the second try; each later one waits twice as long."""

TIMEOUT = 30.0
"""Seconds in which a server must say something."""

_MINE: dict[str, Any] = {"library_name": "moequant", "library_version": __version__}


class Bar(tqdm):  # type: ignore[misc]  # tqdm has no types
    """huggingface_hub's bars, on terminals alone."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "disable": None})


class Unreachable(HubError):
    """The Hub cannot be asked; what is in the cache may do."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One commit of a model: the sizes of its files by their names."""

    model: HubModel
    commit: str
    sizes: Mapping[str, int]


def look_up(model: HubModel) -> Snapshot:
    """What the name means now. Unreachable without the Hub; HubError for a model that is not to be had."""
    from huggingface_hub import HfApi  # a second to import

    with translated(model):
        found = HfApi(**_MINE).model_info(
            model.repository, revision=model.revision, files_metadata=True, timeout=TIMEOUT
        )
    files = {each.rfilename: each.size or 0 for each in found.siblings or ()}
    if found.sha is None:
        raise HubError(f"{model}: the Hub names no commit for it")
    return Snapshot(model, found.sha, files)


def download(found: Snapshot, names: Iterable[str]) -> Path:
    """Those files of a snapshot into the cache, from where a cut download stopped; the snapshot's folder."""
    from huggingface_hub import snapshot_download

    with translated(found.model):
        folder = Path(
            snapshot_download(
                found.model.repository,
                revision=found.commit,
                cache_dir=found.model.cache,
                allow_patterns=[glob.escape(name) for name in names],
                tqdm_class=Bar,
                **_MINE,
            )
        )
        if (name := found.model.revision or "main") != found.commit:
            # As the Hub's own downloads note it: what the name means while there is no network.
            note = folder.parents[1] / "refs" / name
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(found.commit, encoding="utf-8")
    return folder


def fetch(found: Snapshot, name: str, folder: Path) -> None:
    """One file of a snapshot into a folder of its own."""
    from huggingface_hub import hf_hub_download

    with translated(found.model):
        hf_hub_download(
            found.model.repository,
            name,
            revision=found.commit,
            local_dir=folder,
            tqdm_class=Bar,
            **_MINE,
        )


def cached(model: HubModel, why: Unreachable) -> Path:
    """The folder of a snapshot that was downloaded before. `why` is raised when there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    wanted = [glob.escape(model.file)] if model.file else ["config.json"]
    try:
        return Path(
            snapshot_download(
                model.repository,
                revision=model.revision,
                cache_dir=model.cache,
                allow_patterns=wanted,
                local_files_only=True,
            )
        )
    except LocalEntryNotFoundError:
        raise why from None


def cache_folder(model: HubModel) -> Path:
    """Where downloads of a model are kept."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return (model.cache or Path(HF_HUB_CACHE)).expanduser()


def read_range(found: Snapshot, name: str, begin: int, end: int) -> bytes:
    """Bytes `begin` to `end` of a file, end > begin; what a cut connection left out is asked for again."""
    got = bytearray()
    for attempt in range(TRIES):
        if attempt:
            time.sleep(WAIT * 2 ** (attempt - 1))
        try:
            with translated(found.model):
                for part in _parts(found, name, begin + len(got), end):
                    got += part
        except Unreachable:
            if attempt + 1 == TRIES:
                raise
        if len(got) == end - begin:
            return bytes(got)
        if len(got) > end - begin:
            raise HubError(f"{found.model}: {name}: the server sends more than it was asked for")
    raise HubError(f"{found.model}: {name}: the connection ended {TRIES} times; try again later")


def _parts(found: Snapshot, name: str, begin: int, end: int) -> Iterator[bytes]:
    """What one request brings; nothing is read of an answer that is not the range."""
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # public, exported on first use
        build_hf_headers,
        hf_raise_for_status,
    )

    url = hf_hub_url(found.model.repository, name, revision=found.commit)
    asked = {**build_hf_headers(**_MINE), "Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
    with get_session().stream("GET", url, headers=asked, timeout=TIMEOUT) as answer:
        hf_raise_for_status(answer)
        if answer.status_code != 206 or not _is_range(answer.headers.get("Content-Range", ""), begin, end):
            raise HubError(
                f"{found.model}: {name}: the server does not send parts of files; download the "
                "model, and give its folder"
            )
        yield from answer.iter_bytes()


def _is_range(text: str, begin: int, end: int) -> bool:
    return text.startswith(f"bytes {begin}-{end - 1}/")


@contextmanager
def translated(model: HubModel, told: Callable[[HubModel, Any], HubError] | None = None) -> Iterator[None]:
    """Errors of huggingface_hub, and of the libraries under it, as what `told` makes of them; None: what a
    person is told who wants to read."""
    try:
        yield
    except (MoequantError, MemoryError):
        raise
    except Exception as error:
        raise (told or _error)(model, error) from error


def _error(model: HubModel, error: Any) -> HubError:
    from huggingface_hub import errors

    name = model.repository
    match error:
        case errors.GatedRepoError():
            return HubError(
                f"{name}: is gated; ask for access on its page, then log in with `hf auth login` or set "
                "HF_TOKEN"
            )
        case errors.RevisionNotFoundError():
            return HubError(f"{name}: has no revision {model.revision!r}; leave it out for the newest")
        case errors.RepositoryNotFoundError():
            return HubError(
                f"{name}: no such folder here, and no such model on the Hub; a private one needs "
                "`hf auth login` or HF_TOKEN"
            )
        case errors.RemoteEntryNotFoundError():
            return HubError(f"{model}: has no such file")
        case errors.OfflineModeIsEnabled():
            return Unreachable(
                f"{name}: is neither a folder here nor in {cache_folder(model)}, and HF_HUB_OFFLINE forbids "
                "to ask the Hub"
            )
        case errors.HfHubHTTPError() if error.response.status_code == 401:
            return HubError(
                f"{name}: no such folder here, and the Hub does not show it without a login (401): it is "
                "private, or there is no such model; use `hf auth login` or HF_TOKEN"
            )
        case errors.HfHubHTTPError():
            return HubError(f"{name}: the Hub refuses it ({one_line(error)})")
        case OSError() if error.errno is not None:
            return HubError(f"{error.filename or cache_folder(model)}: {error.strerror}")
        case ValueError():
            return HubError(f"{name}: {one_line(error)}")
    if is_network(error):
        return Unreachable(f"{name}: is no folder here, and the Hub cannot be reached ({one_line(error)})")
    return HubError(f"{name}: cannot be read from the Hub ({named_error(error)})")


def is_network(error: Exception) -> bool:
    """Whether the Hub was not reached at all, or its answer broke off. huggingface_hub's versions use HTTP
    libraries of different names, with the same names of errors, and say by one of their own that there is
    neither a connection nor a cached file."""
    names = {each.__name__ for each in type(error).__mro__}
    broken = isinstance(error, ConnectionError | TimeoutError)
    return broken or not names.isdisjoint({"TransportError", "LocalEntryNotFoundError"})


def named_error(error: Exception) -> str:
    """An error that nobody expected: its kind, and what it says."""
    return f"{type(error).__name__}: {one_line(error)}" if str(error).strip() else type(error).__name__
