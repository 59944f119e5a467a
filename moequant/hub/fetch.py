"""From a name to files: which of a model's files belong to it, and where they are read."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path

from moequant.checkpoint import Folder, folder_of
from moequant.checkpoint.folder import INDEX, files_of_model, read_index
from moequant.checkpoint.open import DECLARED
from moequant.containers.folders.side_files import COPIED
from moequant.containers.gguf.header import Header
from moequant.containers.gguf.read import read_header, shards
from moequant.errors import CheckpointError, HubError
from moequant.escape import size
from moequant.files.local import LocalFile
from moequant.hub.client import Snapshot, Unreachable, cache_folder, cached, download, look_up
from moequant.hub.names import GgufModel, HubModel, Model, Source, located
from moequant.hub.ranges import RemoteFile, with_header

SMALL = ("config.json", *DECLARED, "tekken.json", "README.md", INDEX, *COPIED)
"""Patterns of the files that belong to a model beside its weights. No code, no pickles, no second copies."""

GGUF = ".gguf"

_PART = re.compile(r"(.+)-00001-of-(\d{5})\.gguf")

_LOG = logging.getLogger(__name__)


def headers(model: Source) -> Folder:
    """A model by its config, tokenizer and headers; weights that are not on this disk are read by ranges.

    CheckpointError for what is no model folder, HubError for a model that is not to be had.
    """
    if isinstance(model, GgufModel):
        return _of_gguf(model)
    place = located(model)
    if isinstance(place, Path):
        return _of_gguf(GgufModel(place)) if place.suffix == GGUF and place.is_file() else folder_of(place)
    _check_no_file(place)
    try:
        found = look_up(place)
    except Unreachable as why:
        return folder_of(cached(place, why))
    path = download(found, _small(found))
    names = _weights(found, path)
    away = [name for name in names if not (path / name).exists()]
    with ThreadPoolExecutor(8) as pool:
        remote = dict(zip(away, pool.map(lambda name: with_header(found, name), away), strict=True))
    return Folder(path, {name: remote.get(name) or LocalFile(path / name) for name in names})


def _of_gguf(model: GgufModel) -> Folder:
    """A GGUF file, with what it does not say from elsewhere: config.json and tokenizer."""
    file = model.path
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file; give a GGUF file, or the first part of one")
    if isinstance(model.config, HubModel):
        _check_no_file(model.config)
        path = _small_files(model.config)
    else:
        path = file.parent if model.config is None else model.config
    if not (path / "config.json").is_file():
        told = read_header(file).text("general.source.huggingface.repository")
        where = f"--config {told or 'FOLDER'}" + ("" if told else " or --config OWNER/NAME")
        place = "its folder" if model.config is None else f"{path}"
        raise CheckpointError(
            f"{file}: a GGUF file does not say all that transformers needs, and {place} has no config.json; "
            "put the original's config.json and tokenizer there, or tell convert, plan and route their place "
            f"by {where}"
        )
    return Folder(path, {part.name: LocalFile(part) for part in shards(file)}, file)


def _small_files(model: HubModel) -> Path:
    """A folder with what belongs to a model of the Hub beside its weights."""
    try:
        found = look_up(model)
    except Unreachable as why:
        return cached(model, why)
    return download(found, _small(found))


def is_here(folder: Folder) -> bool:
    """Whether all weights are on this disk, or come through a shelf that is."""
    return not _remote(folder)


def complete(folder: Folder) -> Folder:
    """The same commit of the model with all of its weights on this disk."""
    remote = _remote(folder)
    if not remote:
        return folder
    path = _download(remote[0].found, [file.name for file in remote])
    return Folder(path, {name: LocalFile(path / name) for name in folder.weights})


def _remote(folder: Folder) -> list[RemoteFile]:
    return [file for file in folder.weights.values() if isinstance(file, RemoteFile) and not file.shelf]


def whole(model: Model) -> Path:
    """A folder, or a GGUF file, with everything that belongs to it on this disk."""
    place = located(model)
    if isinstance(place, Path):
        return place
    try:
        found = look_up(place)
    except Unreachable as why:
        path = cached(place, why)
        return path / place.file if place.file else path
    if place.file:
        return _download(found, _parts(found, place.file)) / place.file
    path = download(found, _small(found))
    return _download(found, _weights(found, path))


def gguf_header(model: HubModel) -> Header:
    """The header of a GGUF file of the Hub, read by ranges where the file is not on this disk."""
    assert model.file
    try:
        found = look_up(model)
    except Unreachable as why:
        return read_header(cached(model, why) / model.file)
    folder = _snapshot(found)
    names = _parts(found, model.file)
    away = {Path(name).name: RemoteFile(found, name, b"") for name in names if not (folder / name).exists()}
    return read_header(folder / model.file, away)


def _small(found: Snapshot) -> list[str]:
    """The files of a snapshot that belong to the model and are no weights."""
    names = [name for name in found.sizes if any(_matches(name, pattern) for pattern in SMALL)]
    if "config.json" not in names:
        raise HubError(
            f"{found.model}: has no config.json, so it is not a model folder; to take a GGUF file of it, "
            f"write {found.model.repository}:FILE.gguf"
        )
    return names


def _matches(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/") and fnmatch(name, pattern)


def _weights(found: Snapshot, path: Path) -> list[str]:
    """The safetensors files that are the model; see `files_of_model`."""
    there = [name for name in found.sizes if _matches(name, "*.safetensors")]
    names = files_of_model(there, read_index(path) if INDEX in found.sizes else {})
    if not names:
        raise HubError(f"{found.model}: has no *.safetensors file; other weight formats are not read")
    if gone := [name for name in names if name not in found.sizes]:
        raise HubError(f"{found.model}: {gone[0]} is in {INDEX} but not among its files")
    return names


def _parts(found: Snapshot, file: str) -> Sequence[str]:
    """A GGUF file of a snapshot, all its parts when it is the first of several."""
    names = [file]
    if part := _PART.fullmatch(file):
        names = [f"{part[1]}-{number:05d}-of-{part[2]}.gguf" for number in range(1, int(part[2]) + 1)]
    if gone := [name for name in names if name not in found.sizes]:
        there = sorted(name for name in found.sizes if name.endswith(".gguf"))
        some = f"; it has {', '.join(there[:5])}{' …' if len(there) > 5 else ''}" if there else ""
        raise HubError(f"{found.model.repository}: has no file {gone[0]}{some}")
    return names


def _check_no_file(model: HubModel) -> None:
    if model.file:
        raise HubError(f"{model}: names a GGUF file; give OWNER/NAME without a file here")


def _snapshot(found: Snapshot) -> Path:
    """Where the cache keeps a snapshot, whether it is there or not."""
    model = f"models--{found.model.repository.replace('/', '--')}"
    return cache_folder(found.model) / model / "snapshots" / found.commit


def _download(found: Snapshot, names: Collection[str]) -> Path:
    """Weights into the cache, after a look at the disk."""
    cache = cache_folder(found.model)
    there = _snapshot(found)
    missing = [name for name in names if not (there / name).exists()]
    needed = sum(found.sizes[name] for name in missing)
    if needed:
        begun = sum(file.stat().st_blocks * 512 for file in there.parents[1].glob("blobs/*.incomplete"))
        _check_space(cache, found, max(needed - begun, 0))
        files = "1 file" if len(missing) == 1 else f"{len(missing)} files"
        _LOG.info(
            "%s at %s: %s in %s to download into %s",
            found.model.repository, found.commit[:12], size(needed), files, cache,
        )  # fmt: skip
    return download(found, names)


def _check_space(cache: Path, found: Snapshot, needed: int) -> None:
    """HubError when a download does not fit."""
    place = next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise HubError(
            f"{found.model}: {size(needed)} are still to download and {cache} has {size(free)} "
            "free; --cache-dir names a folder on another disk"
        )
