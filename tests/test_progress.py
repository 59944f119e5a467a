"""What a stage costs is what it did."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from moequant.progress import Meter


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what a process reads")
def test_bytes_that_a_stage_reads_are_its_own(tmp_path: Path) -> None:
    file = tmp_path / "data"
    file.write_bytes(bytes(3_000_000))
    meter = Meter()
    with meter.stage("idle"):
        pass
    with meter.stage("read"):
        file.read_bytes()
    idle, read = meter.costs
    assert idle.read_bytes is not None and idle.read_bytes < 100_000
    assert read.read_bytes is not None and 3_000_000 <= read.read_bytes < 3_100_000
    assert read.peak_bytes > 0 and read.seconds > 0
