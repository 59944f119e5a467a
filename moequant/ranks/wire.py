"""What ranks say to each other: any value, over gloo, tensors without a copy of their own in the text.

All that is said lies in the memory of the CPU, where hidden states and packed weights are anyway. So this is
the same for ranks that compute on GPUs, and needs no second way.
"""

from __future__ import annotations

import io
import os
import pickle
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from moequant.errors import MoequantError, RankError, lacks_memory, one_line

T = TypeVar("T")

FOREVER = timedelta(days=365)
"""Ranks wait for each other as long as work takes. One that dies closes its connections, which ends that."""

WHY, OVER, SAID, FIRST, PARTED = (f"moequant/{name}" for name in ("why", "over", "said", "first", "parted"))
"""Keys of torchrun's store, which outlives the ranks: why a rank ended the run, that the first has ended and
has said so, how many others would say it for one that is dead, which process the first is, and how many have
nothing more to do."""


class Wire:
    """The connections of this rank to all others, as torchrun's environment describes them."""

    def __init__(self) -> None:
        """RankError where the others are not found."""
        try:
            self._store, self.rank, self.count = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
            self._store.set_timeout(FOREVER)
            if not self.rank:
                self._store.set(FIRST, f"{os.getpid()} {socket.gethostname()}")
            # A group of our own: transformers does other things where the process has a default group.
            named = dist.PrefixStore("moequant", self._store)  # type: ignore[attr-defined]
            self._group: Any = dist.ProcessGroupGloo(named, self.rank, self.count, FOREVER)
        except (RuntimeError, ValueError) as error:
            raise RankError(
                f"the processes that torchrun started do not find each other ({one_line(error)})"
            ) from None

    def share(self, value: Any, source: int) -> Any:
        """What rank `source` says: its `value`, on every rank. What a rank that ended the run said, or
        RankError where one is gone."""
        text, parts = packed(value) if source == self.rank else (b"", [])
        try:
            count = self._pass(torch.tensor([len(parts)]), source)
            sizes = torch.tensor([len(text), *(len(part) for part in parts)])
            sizes = self._pass(sizes if source == self.rank else torch.empty(int(count) + 1).long(), source)
            if source == self.rank:
                for part in (torch.frombuffer(bytearray(text), dtype=torch.uint8), *parts):
                    self._pass(part, source)
                return value
            told = [self._pass(torch.empty(size, dtype=torch.uint8), source) for size in sizes.tolist()]
        except RuntimeError:
            raise self._lost() from None
        return unpacked(told[0].numpy().tobytes(), told[1:])

    def read(self, found: Iterator[T]) -> Iterator[T]:
        """The same; where somebody stops before the end, the others, who go on, are let go."""
        try:
            yield from found
        except GeneratorExit:
            self.close()
            raise

    def _pass(self, values: Tensor, source: int) -> Tensor:
        if values.numel():
            if self._group is None:
                raise RuntimeError("the others were let go")
            self._group.broadcast(values, source).wait()
        return values

    def _lost(self) -> Exception:
        """A rank has closed its connections. torchrun will end the others: that must not disturb them while
        they clean up."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with suppress(RuntimeError):  # torchrun is gone, and its store with it
            if not self.rank and self._store.check([WHY]):
                why: Exception = pickle.loads(self._store.get(WHY))
                return why
        return RankError("another process of this run has ended; was it killed, or out of memory?")

    def end(self, error: BaseException) -> bool:
        """This rank, not the first, ends with that error. Whether it is the one to say so: only where the
        first is dead, and no other does."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        is_told = isinstance(error, (MoequantError, OSError)) or lacks_memory(error)
        if is_told and not isinstance(error, RankError):
            with suppress(RuntimeError):  # torchrun is gone: nobody asks why
                self._store.set(WHY, pickle.dumps(error))
        self.close()
        try:
            while not self._store.check([OVER]):
                if not self._first_lives():
                    return bool(self._store.add(SAID, 1) == 1)
                time.sleep(0.05)
        except RuntimeError:  # torchrun is gone
            return False
        return False

    def _first_lives(self) -> bool:
        pid, host = self._store.get(FIRST).decode().split()
        try:
            os.kill(int(pid) if host == socket.gethostname() else os.getpid(), 0)
        except OSError:
            return False
        return True

    def part(self) -> None:
        """Wait until every rank has come to its end: one that let go of the others before that would look
        like one that is dead."""
        with suppress(RuntimeError):  # torchrun is gone: nobody judges how ranks end
            self._store.add(PARTED, 1)
            while int(self._store.add(PARTED, 0)) < self.count:
                if self.rank and not self._first_lives():
                    return
                time.sleep(0.02)

    def close(self) -> None:
        """Let go of the others, which the first does when it has said why. Once is enough."""
        if not self.rank:
            with suppress(RuntimeError):
                self._store.set(OVER, "")
        self._group = None


class _Packing(pickle.Pickler):
    """Leaves the bytes of tensors to `parts`, u8 [n] each."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5)
        self.parts: list[Tensor] = []

    def persistent_id(self, value: Any) -> Any:
        """See `pickle.Pickler`."""
        if not isinstance(value, Tensor):
            return None
        self.parts.append(value.detach().cpu().contiguous().view(-1).view(torch.uint8))
        return len(self.parts) - 1, value.dtype, tuple(value.shape)


class _Unpacking(pickle.Unpickler):
    """Finds them there."""

    def __init__(self, file: io.BytesIO, parts: Sequence[Tensor]) -> None:
        super().__init__(file)
        self._parts = parts

    def persistent_load(self, name: Any) -> Tensor:
        """See `pickle.Unpickler`."""
        at, dtype, shape = name
        values: Tensor = self._parts[at].view(dtype).view(shape)
        return values


def packed(value: Any) -> tuple[bytes, list[Tensor]]:
    """A value as text, and the bytes of its tensors beside it, u8 [n] each, on the CPU."""
    file = io.BytesIO()
    packing = _Packing(file)
    packing.dump(value)
    return file.getvalue(), packing.parts


def unpacked(text: bytes, parts: Sequence[Tensor]) -> Any:
    """The value that `packed` was given."""
    return _Unpacking(io.BytesIO(text), parts).load()
