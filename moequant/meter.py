"""What a stage costs: wall time and peak memory, one line a stage."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


@dataclass(frozen=True, slots=True)
class StageCost:
    """Wall seconds and peak resident bytes of one stage (of the run so far, where not on Linux)."""

    name: str
    seconds: float
    peak_bytes: int


@dataclass(slots=True)
class Meter:
    """Collects the cost of each stage that runs inside `stage`."""

    costs: list[StageCost] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure the block under that name."""
        _reset_peak()
        start = time.perf_counter()
        yield
        self.costs.append(StageCost(name, time.perf_counter() - start, _peak_bytes()))


def available_bytes() -> int | None:
    """Memory that a process may still take without swapping, None where Linux does not tell."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _reset_peak() -> None:
    try:
        _CLEAR.write_text("5")  # Linux: VmHWM starts again from the present size
    except OSError:
        return


def _peak_bytes() -> int:
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
