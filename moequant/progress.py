"""What a stage costs: wall time, peak memory and bytes read, one line a stage."""

from __future__ import annotations

import logging
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

_LOG = logging.getLogger(__name__)

_MEMORY = Path("/proc/meminfo")
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_IO = Path("/proc/self/io")


@dataclass(frozen=True, slots=True)
class StageCost:
    """Wall seconds, peak resident bytes and bytes read from files of one stage.

    Where not on Linux the peak is that of the run so far, and reads are unknown (None).
    """

    name: str
    seconds: float
    peak_bytes: int
    read_bytes: int | None = None


@dataclass(slots=True)
class Meter:
    """Collects the cost of each stage that runs inside `stage`."""

    costs: list[StageCost] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure the block under that name."""
        _reset_peak()
        start, before = time.perf_counter(), _read_bytes()
        yield
        after = _read_bytes()
        read = None if before is None or after is None else after - before
        self.costs.append(StageCost(name, time.perf_counter() - start, peak_bytes(), read))
        _LOG.debug(
            "%s: %.1f s, %.0f MB at most", name, self.costs[-1].seconds, self.costs[-1].peak_bytes / 1e6
        )


def available_bytes() -> int | None:
    """Memory that a process may still take without swapping, None where Linux does not tell."""
    return _size(_MEMORY, "MemAvailable:")


def total_memory() -> int | None:
    """The machine's memory in bytes, None where Linux does not tell."""
    return _size(_MEMORY, "MemTotal:")


def _read_bytes() -> int | None:
    """Bytes that this process has read from files, be it from the cache; mapped files are not counted."""
    try:
        for line in _IO.read_text().splitlines():
            if line.startswith("rchar:"):
                return int(line.split()[1])
    except OSError:
        pass
    return None


def _reset_peak() -> None:
    try:
        _CLEAR.write_text("5")  # Linux: VmHWM starts again from the present size
    except OSError:
        return


def resident_bytes() -> int:
    """Memory of this process now; its peak so far where Linux does not tell."""
    return _size(_STATUS, "VmRSS:") or peak_bytes()


def peak_bytes() -> int:
    """The most memory that this process had, since its start or the last stage began."""
    return _size(_STATUS, "VmHWM:") or _peak_of_the_run()


def _size(file: Path, key: str) -> int | None:
    """A size that Linux states in kB, in bytes."""
    try:
        for line in file.read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _peak_of_the_run() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
