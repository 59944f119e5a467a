"""Hidden states of every batch between two layers: in memory, or in a file past a limit."""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import BinaryIO, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moequant.errors import OutputError
from moequant.files import reason, sync
from moequant.ranks import Ranks


class Hidden(Protocol):
    """The hidden states in front of a layer, batch by batch; f32 [rows, n, h] each."""

    def get(self, layer: int, batch: int) -> Tensor:
        """What batch `batch` feeds layer `layer`."""

    def put(self, layer: int, batch: int, states: Tensor) -> None:
        """Keep what batch `batch` feeds layer `layer`; the states before the layer stay until `drop`."""

    def drop(self, layer: int) -> None:
        """Forget what was fed to `layer`: all batches have crossed it."""

    def sync(self, layer: int) -> None:
        """What is fed to `layer` is all there; if it is to outlive the process, it is on the disk now."""


class InMemory:
    """Hidden states in one block of memory, which is there from the first `put` on.

    What a batch fed one layer goes when what it feeds the next arrives. `shapes` are those of the batches.
    """

    # One block: as tensors of their own, kept among what threads compute and forget, states held twice
    # their bytes, because glibc could not give back what lay between them.

    def __init__(self, shapes: Sequence[tuple[int, ...]]) -> None:
        self.shapes, self._lock = shapes, Lock()
        self._states: list[Tensor] = []

    def get(self, layer: int, batch: int) -> Tensor:
        """See `Hidden`."""
        return self._states[batch]

    def put(self, layer: int, batch: int, states: Tensor) -> None:
        """See `Hidden`."""
        with self._lock:
            if not self._states:
                sizes = [math.prod(shape) for shape in self.shapes]
                with torch.inference_mode(False):  # a tensor that is made inside cannot be written outside
                    parts = torch.split(torch.empty(sum(sizes)), sizes)
                    self._states = [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]
        self._states[batch].copy_(states)

    def drop(self, layer: int) -> None:
        """Nothing is left to forget."""

    def sync(self, layer: int) -> None:
        """Nothing outlives the process."""


class OnDisk:
    """Hidden states in one file a layer under `folder`, read and written a batch at a time.

    In the file every batch is followed by a checksum of its numbers and of its place. `shapes` are those of
    the batches; `again` ends the message about a file that is damaged. Files of finished layers survive the
    process, which is what a resumed run starts from.
    """

    def __init__(self, folder: Path, shapes: Sequence[tuple[int, ...]], again: str = "") -> None:
        self.folder, self.shapes = folder, shapes
        self.again = again or f"delete {folder} to begin again"
        sizes = [int(np.prod(shape)) + 1 for shape in shapes]  # and the checksum
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).tolist()

    def get(self, layer: int, batch: int) -> Tensor:
        """See `Hidden`."""
        start, stop = self._starts[batch], self._starts[batch + 1]
        try:
            with self._open(layer, os.O_RDONLY) as file:
                values = np.fromfile(file, np.float32, stop - start, offset=4 * start)
        except OSError as error:
            raise OutputError(
                f"{self.path(layer)}: hidden states cannot be read ({error}); {self.again}"
            ) from None
        if len(values) < stop - start or values[-1:].view(np.uint32)[0] != _checksum(
            values[:-1], layer, batch
        ):
            raise OutputError(f"{self.path(layer)}: hidden states are damaged; {self.again}")
        return torch.from_numpy(values[:-1]).view(self.shapes[batch])

    def put(self, layer: int, batch: int, states: Tensor) -> None:
        """See `Hidden`."""
        path = self.path(layer)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._open(layer, os.O_RDWR | os.O_CREAT) as file:
                file.seek(4 * self._starts[batch])
                values = states.detach().float().cpu().contiguous().numpy()
                values.tofile(file)
                np.array(_checksum(values, layer, batch), np.uint32).tofile(file)
        except OSError as error:
            needed = 4 * self._starts[-1]
            raise OutputError(
                f"{path}: hidden states cannot be kept ({reason(error)}); a layer's take {needed:,} bytes, "
                "twice"
            ) from None

    def drop(self, layer: int) -> None:
        """See `Hidden`."""
        self.path(layer).unlink(missing_ok=True)

    def sync(self, layer: int) -> None:
        """See `Hidden`."""
        try:
            with self._open(layer, os.O_RDONLY) as file:
                os.fsync(file)
            sync(self.folder)
        except OSError as error:
            raise OutputError(f"{self.path(layer)}: hidden states cannot be kept ({reason(error)})") from None

    def _open(self, layer: int, flags: int) -> BinaryIO:
        """The file of a layer itself, never what a link in its place leads to."""
        handle = os.open(self.path(layer), flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        return os.fdopen(handle, "rb" if flags == os.O_RDONLY else "r+b")

    def path(self, layer: int) -> Path:
        """Where the states in front of `layer` lie."""
        return self.folder / f"hidden-{layer:04d}.f32"


class Batches:
    """Some of the batches of `whole`, from `first` on, as hidden states of their own. Whoever has the whole
    drops and syncs it."""

    def __init__(self, whole: Hidden, first: int) -> None:
        self.whole, self.first = whole, first

    def get(self, layer: int, batch: int) -> Tensor:
        """See `Hidden`."""
        return self.whole.get(layer, self.first + batch)

    def put(self, layer: int, batch: int, states: Tensor) -> None:
        """See `Hidden`."""
        self.whole.put(layer, self.first + batch, states)

    def drop(self, layer: int) -> None:
        """Others may still need theirs."""

    def sync(self, layer: int) -> None:
        """Those of others may not be there yet."""


class Lasting:
    """Hidden states that outlive the process: on `disk`, and where there is room also in `memory`, which
    spares reading them."""

    def __init__(self, disk: OnDisk | Batches, memory: InMemory | None) -> None:
        self.disk, self.memory = disk, memory

    def get(self, layer: int, batch: int) -> Tensor:
        """See `Hidden`."""
        return (self.memory or self.disk).get(layer, batch)

    def put(self, layer: int, batch: int, states: Tensor) -> None:
        """See `Hidden`."""
        self.disk.put(layer, batch, states)
        if self.memory is not None:
            self.memory.put(layer, batch, states)

    def drop(self, layer: int) -> None:
        """See `Hidden`."""
        self.disk.drop(layer)

    def sync(self, layer: int) -> None:
        """See `Hidden`."""
        self.disk.sync(layer)

    def resume(self, layer: int, batches: Sequence[int]) -> None:
        """Go on from what an earlier process left of these in front of `layer`. OutputError when it is
        damaged."""
        for batch in batches:
            states = self.disk.get(layer, batch)
            if self.memory is not None:
                self.memory.put(layer, batch, states)


@contextmanager
def settled(states: Sequence[Hidden], layer: int, ranks: Ranks) -> Iterator[None]:
    """This rank has written all that is fed to `layer`. In the block, where that is noted, all ranks have,
    and it is on the disk; what was fed to the layer before is forgotten only after that."""
    ranks.wait()
    for each in states if ranks.first else ():
        each.sync(layer)
    yield
    for each in states if ranks.first else ():
        each.drop(layer - 1)


def _checksum(values: NDArray[np.float32], layer: int, batch: int) -> int:
    """CRC-32 of the numbers f32 [..], for that layer and batch: those of another place are no good either."""
    return zlib.crc32(np.ascontiguousarray(values).data, zlib.crc32(f"{layer} {batch}".encode()))
