"""The other way: a folder of files into a repository of the Hub. First what would be done, then doing it."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moequant import __version__
from moequant.errors import HubError, OutputError, one_line
from moequant.escape import plain, shown
from moequant.files import JOURNAL
from moequant.hub.client import TIMEOUT, Unreachable, is_network, named_error, translated
from moequant.hub.names import HubModel
from moequant.progress import Bar, counted

TEXTS = (".md", ".json", ".html", ".txt", ".jinja", ".csv")
"""Files that people read, and in which a place on this machine would be seen."""

PLACEHOLDER = "YOUR_NAME/REPOSITORY"
"""What a card says for the repository, which nobody knows when the card is written."""

CHUNK = 1 << 24
"""Bytes that are hashed at a time."""

READ = 8_000_000
"""Bytes of such a file that are looked at."""


@dataclass(frozen=True, slots=True)
class PushSettings:
    """How files are published. `private` hides a repository that is made for them; `message` is what the
    commit says, None which moequant uploaded it."""

    private: bool = False
    message: str | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """One file that goes up: its name in the repository, and whether it replaces one of that name.

    `written` is when it was last written, in nanoseconds: a file that changes after it was shown stays.
    """

    name: str
    bytes: int
    replaces: bool
    written: int


@dataclass(frozen=True, slots=True)
class Push:
    """What is published where.

    `parent` is the commit that is there now, None where `repository` is made. `left_out` are names in the
    folder that stay here. `commit` and `url` are of what was uploaded, None as long as nothing was.
    """

    repository: HubModel
    folder: Path
    parent: str | None
    private: bool
    files: tuple[Piece, ...]
    left_out: tuple[str, ...]
    notes: tuple[str, ...]
    commit: str | None = None
    url: str | None = None

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(each.bytes for each in self.files)


def prepare(name: str, folder: Path, settings: PushSettings) -> Push:
    """What would be uploaded; nothing is changed. HubError for what is no name of the Hub or cannot be looked
    at, OutputError for a folder that has nothing to upload."""
    model = _parsed(name, folder)
    names, left_out = _names(folder)
    there = _look_up(model)
    if there is not None and settings.private and not there.private:
        raise HubError(
            f"{model}: is there already and public; --private is only for a repository that is made"
        )
    known = set() if there is None else {each.rfilename for each in there.siblings or ()}
    return Push(
        repository=model,
        folder=folder,
        parent=None if there is None else there.sha,
        private=settings.private if there is None else bool(there.private),
        files=tuple(_piece(folder, each, each in known) for each in names),
        left_out=left_out,
        notes=tuple(_notes(model.repository, folder, names, known)),
    )


def upload(push: Push, settings: PushSettings) -> Push:
    """Do it, in one commit. HubError when the Hub refuses, or when somebody changed the repository since
    `prepare`: then nothing is seen there, and the bytes that have arrived are not sent again. OutputError for
    a file that is not what `prepare` found."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api, model = HfApi(library_name="moequant", library_version=__version__), push.repository
    with translated(model, _error), _quiet():
        _check_same(push)
        if push.parent is None:
            api.create_repo(model.repository, private=push.private, exist_ok=False)
        adding = [CommitOperationAdd(each.name, push.folder / each.name) for each in push.files]
        _hash(adding, push.bytes)
        for each in counted("upload", adding, "file"):
            api.preupload_lfs_files(model.repository, [each], revision=model.revision, free_memory=False)
        _check_same(push)
        made = api.create_commit(
            model.repository,
            adding,
            commit_message=settings.message or f"Upload with moequant {__version__}",
            revision=model.revision,
            parent_commit=push.parent,
        )
    return replace(push, commit=made.oid, url=made.commit_url)


def _hash(adding: list[Any], total: int) -> None:
    """The digests that LFS asks for, counted: large files take minutes. Xet finds them as it uploads."""
    from huggingface_hub import constants

    if not constants.HF_HUB_DISABLE_XET and find_spec("hf_xet") is not None:
        return
    with Bar("hash", total, "B") as bar:
        for each in adding:
            if each.upload_info.is_hashed:
                continue
            digest = hashlib.sha256()
            with each.as_file() as file:
                while part := file.read(CHUNK):
                    digest.update(part)
                    bar.update(len(part))
            each.upload_info.sha256 = digest.digest()


def _piece(folder: Path, name: str, replaces: bool) -> Piece:
    found = (folder / name).stat()
    return Piece(name, found.st_size, replaces, found.st_mtime_ns)


def _check_same(push: Push) -> None:
    for each in push.files:
        file = push.folder / each.name
        if not file.is_file() or _piece(push.folder, each.name, each.replaces) != each:
            raise OutputError(f"{file}: has changed since it was shown; give the command again")


def _parsed(name: str, folder: Path) -> HubModel:
    model = HubModel.parse(name)
    if model is None or model.file:
        swapped = HubModel.parse(str(folder)) is not None and Path(name).is_dir()
        first = (
            "the name comes first, then the folder" if swapped else "write OWNER/NAME or OWNER/NAME@BRANCH"
        )
        raise HubError(f"{name}: is no name of a repository on the Hub; {first}")
    if folder.is_file():
        raise OutputError(f"{folder}: is a file; give the folder that holds what is to be published")
    if not folder.is_dir():
        raise OutputError(f"{folder}: no such folder; give the one that holds what is to be published")
    return model


def _names(folder: Path) -> tuple[list[str], tuple[str, ...]]:
    """Files to upload, and what stays: hidden names, what is kept of a run that did not end, links to
    folders, and what is no file."""
    names, left = [], set()
    for file in sorted(folder.rglob("*")):
        parts = file.relative_to(folder).parts
        stays = [at for at, part in enumerate(parts) if part.startswith(".") or part.endswith(JOURNAL)]
        if stays:
            left.add("/".join(parts[: stays[0] + 1]))
        elif file.is_file():
            names.append("/".join(parts))
        elif file.is_symlink() or not file.is_dir():
            left.add("/".join(parts))
    if not names:
        raise OutputError(
            f"{folder}: has no file to upload; `moequant convert -o {shown(folder)}/` makes some"
        )
    return names, tuple(sorted(left))


def _notes(repository: str, folder: Path, names: list[str], known: set[str]) -> Iterator[str]:
    """What a person should see before it is public."""
    for journal in _journals(folder):
        yield (
            f"a conversion has not ended ({journal}): what it makes is not among these files; give its "
            "command again to finish it"
        )
    if "README.md" not in names and "README.md" not in known:
        yield "there is no README.md; `moequant convert --card` writes one"
    if "README.md" in names and "# base_model: " in _text(folder / "README.md"):
        yield "README.md does not name the base model yet: its first lines have the place"
    if "README.md" in names and PLACEHOLDER in _text(folder / "README.md"):
        yield f"README.md says {PLACEHOLDER}; put {repository} there, so that its commands can be copied"
    places = {f"{place}/" for place in (Path.home(), folder.resolve().parent, Path.cwd()) if place.parts[1:]}
    for name in names:
        if (folder / name).is_symlink():
            yield f"{name} is a link: what is uploaded is {plain(str((folder / name).resolve()))}"
        if Path(name).suffix in TEXTS and any(place in _text(folder / name) for place in places):
            yield f"{name} names a folder of this machine; look at it before it is public"


def _journals(folder: Path) -> Iterator[str]:
    """What runs that did not end keep: of files in the folder, and of the folder itself."""
    whole = folder.resolve()
    yield from sorted(
        each.relative_to(whole).as_posix() for each in whole.rglob(f"*{JOURNAL}") if each.is_dir()
    )
    beside = whole.with_name(whole.name + JOURNAL)
    if beside.is_dir():
        yield beside.name


def _text(file: Path) -> str:
    with file.open(encoding="utf-8", errors="replace") as opened:
        return opened.read(READ)


def _look_up(model: HubModel) -> Any:
    """What the Hub says of the repository, None where there is none that this person sees."""
    from huggingface_hub import HfApi, errors

    api = HfApi(library_name="moequant", library_version=__version__)
    try:
        with translated(model, _error):
            return api.model_info(model.repository, revision=model.revision, timeout=TIMEOUT)
    except HubError as error:
        why = error.__cause__
        if not isinstance(why, errors.RepositoryNotFoundError) or isinstance(why, errors.GatedRepoError):
            raise
        if model.revision is not None:
            raise HubError(
                f"{model.repository}: is not on the Hub, so it has no branch {model.revision}"
            ) from None
        return None


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars of huggingface_hub's where nobody watches."""
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # public, exported on first use
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    hides = not sys.stderr.isatty() and not are_progress_bars_disabled()
    if hides:
        disable_progress_bars()
    try:
        yield
    finally:
        if hides:
            enable_progress_bars()


def _why(error: Any, status: int) -> str:
    """The status, and what the Hub says: it may be full, or the name somebody else's."""
    return (
        f"{status}: {one_line(error.server_message, 200).rstrip('.')}"
        if error.server_message
        else str(status)
    )


def _error(model: HubModel, error: Any) -> HubError:
    from huggingface_hub import errors

    name = model.repository
    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # "Error while uploading …"
        return _error(model, error.__cause__)
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    match error:
        case errors.RevisionNotFoundError():
            return HubError(f"{name}: has no branch {model.revision}; make it on the Hub, or leave it out")
        case errors.OfflineModeIsEnabled():
            return HubError(f"{name}: HF_HUB_OFFLINE forbids to ask the Hub; unset it to upload")
        case errors.HfHubHTTPError() if status in (401, 403, 404):
            return HubError(
                f"{name}: the Hub does not let you write there ({_why(error, status)}); log in with "
                "`hf auth login`, or set HF_TOKEN to a token that may write"
            )
        case errors.HfHubHTTPError() if status in (409, 412):
            return HubError(f"{name}: has changed since it was looked at; give the command again")
        case errors.HfHubHTTPError():
            return HubError(f"{name}: the Hub refuses it ({one_line(error)})")
        case OSError() if error.errno is not None and error.filename:
            return HubError(f"{error.filename}: {error.strerror}")
        case ValueError():
            return HubError(f"{name}: {one_line(error)}")
    if is_network(error):
        return Unreachable(f"{name}: the Hub cannot be reached ({one_line(error)}); give the command again")
    return HubError(f"{name}: the upload failed ({named_error(error)})")
