"""A model that is larger than the disk: its files come when they are read, and go when others need room."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from threading import Lock
from typing import Any

from moequant.checkpoint import Checkpoint, Folder
from moequant.errors import HubError
from moequant.files import scratch
from moequant.hub.client import Snapshot, cache_folder, fetch
from moequant.hub.ranges import RemoteFile
from moequant.ranks import here

_LOG = logging.getLogger(__name__)


class Shelf:
    """At most `limit` bytes of a snapshot's files in `folder`; those read longest ago make room."""

    def __init__(self, found: Snapshot, folder: Path, limit: int) -> None:
        self.limit, self.fetched = limit, 0
        self._found, self._folder = found, folder
        self._held = _Held(limit)
        self._lock = Lock()

    def read_into(self, name: str, begin: int, buffer: Any) -> int:
        """Bytes of a file from `begin`, as many as the buffer takes; how many there were."""
        with self._lock:
            size = self._found.sizes[name]
            if gone := self._held.take(name, size):
                for other in gone - {name}:
                    (self._folder / other).unlink()
                fetch(self._found, name, self._folder)
                self.fetched += size
            file = (self._folder / name).open("rb", buffering=0)
        with file:
            file.seek(begin)
            return file.readinto(buffer)


class _Held:
    """Which files are held, in the order of their last reading."""

    def __init__(self, limit: int) -> None:
        self._limit, self._sizes = limit, dict[str, int]()

    def take(self, name: str, size: int) -> set[str]:
        """A file is read: itself and those that make room for it, when it was not there; else nothing."""
        held = self._sizes.pop(name, None)
        gone = set() if held is not None else {name}
        while held is None and self._sizes and sum(self._sizes.values()) + size > self._limit:
            oldest = next(iter(self._sizes))
            del self._sizes[oldest]
            gone.add(oldest)
        self._sizes[name] = size
        return gone


@contextmanager
def streamed(folder: Folder, limit: int | None) -> Iterator[Folder]:
    """The same model with at most `limit` bytes of weights on this disk at a time; unchanged without a limit,
    or when all weights are here."""
    remote = [file for file in folder.weights.values() if isinstance(file, RemoteFile)]
    if limit is None or not remote:
        yield folder
        return
    if here().count > 1:
        raise HubError("--stream goes with one process, and torchrun started several; leave one of them out")
    cache = cache_folder(remote[0].found.model)
    cache.mkdir(parents=True, exist_ok=True)
    with scratch(cache) as place:
        shelf = Shelf(remote[0].found, place, limit)
        yield Folder(
            folder.path, {**folder.weights, **{file.name: replace(file, shelf=shelf) for file in remote}}
        )


def shelf_of(checkpoint: Checkpoint) -> Shelf | None:
    """The shelf that the weights of a model come from; None for a model that lies here."""
    files = (ref.file for w in checkpoint.weights for each in w.origin.stored for ref in each.parts.values())
    return next((file.shelf for file in files if isinstance(file, RemoteFile) and file.shelf), None)


def announce(checkpoint: Checkpoint, passes: int) -> int:
    """Says how many bytes `passes` over the layers will fetch in all, and gives that number; 0 for a model
    that lies here. HubError where the files of one layer are more than may be kept."""
    shelf = shelf_of(checkpoint)
    if shelf is None:
        return 0
    held, total = _Held(shelf.limit), 0
    layers = [
        _files(list(group)) for _, group in groupby(checkpoint.weights, key=lambda weight: weight.layer)
    ]
    for files in layers:
        if sum(files.values()) > shelf.limit:
            raise HubError(
                f"{checkpoint.repository}: one layer lies in files of {sum(files.values()) / 1e9:.1f} GB; "
                f"--stream {shelf.limit / 1e9:.1f}G is too small for it"
            )
    for files in layers * passes:
        total += sum(size for name, size in files.items() if held.take(name, size))
    _LOG.info(
        "%s: %d passes over its layers fetch %.1f GB in all, with at most %.1f GB of them on disk",
        checkpoint.repository, passes, total / 1e9, shelf.limit / 1e9,
    )  # fmt: skip
    return total


def _files(weights: list[Any]) -> dict[str, int]:
    """The files of weights with their sizes, in the order in which they are read."""
    refs = (ref for w in weights for each in w.origin.stored for ref in each.parts.values())
    return {ref.file.name: ref.file.bytes for ref in refs}
