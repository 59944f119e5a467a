"""What a stage costs is what it did."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moequant.progress import Bar, Meter, Progress, advance, listening, resident_bytes


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


def test_what_a_stage_starts_is_charged_to_it() -> None:
    """The self-check runs llama.cpp in a process of its own."""
    meter = Meter()
    work = "import time\nwhile time.process_time() < 0.2: pass"
    with meter.stage("child"):
        subprocess.run([sys.executable, "-S", "-c", work], check=True)
    assert meter.costs[0].cpu_seconds > 0.2


@pytest.mark.skipif(
    sys.platform != "linux", reason="only glibc keeps what is free, and gives it back when asked"
)
def test_a_stage_is_not_charged_with_what_the_one_before_it_freed() -> None:
    meter = Meter()
    with meter.stage("much"):
        pieces = [bytearray(100_000) for _ in range(2_000)]
    used = resident_bytes()
    kept = pieces[::50]  # so that the heap does not end where it is free
    del pieces
    with meter.stage("little"):
        pass
    assert len(kept) == 40 and meter.costs[1].peak_bytes < used - 100_000_000


def test_a_bar_says_how_fast_how_long_and_how_much_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", terminal)
    with Bar("calibrate", 4, "layer") as bar:
        for _ in range(4):
            time.sleep(0.11)  # terminals are written to ten times a second
            bar.update()
    # calibrate:  75%|███████▌  | 3/4 [00:00<00:00,  9.0layer/s, 0.4 GB]
    assert re.search(r"calibrate:.*3/4 \[00:00<00:00, .*layer/s, [0-9.]+ GB\]", terminal.getvalue())


def test_a_bar_counts_what_is_done_far_below_it_once() -> None:
    """Weights of a layer are counted as they are rounded, and not again when the layer comes."""
    steps = list[Progress]()
    advance(1)  # nobody counts
    with listening(steps.append), Bar("quantize", 10, "w", done=2) as bar:
        bar.give(1)
        advance(3)
        bar.at(5)
        bar.at(8)
        with Bar("inner", 1, "x"):
            advance(1)
        advance(2)
    advance(1)
    counted = [(step.stage, step.done, step.given) for step in steps]
    assert counted == [
        ("quantize", 2, 2),
        ("quantize", 3, 3),
        ("quantize", 6, 3),
        ("quantize", 8, 3),
        ("inner", 0, 0),
        ("inner", 1, 0),
        ("quantize", 10, 3),
    ]


def test_a_terminal_is_told_the_time_that_the_rest_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", terminal)
    with Bar("quantize", 1000, "w") as bar:
        bar.give(900)
        time.sleep(1.2)
        bar.update(50)
    # quantize:  95%|█████████▌| 950/1000 [00:01<00:01, 41.6w/s, 0.4 GB]
    (left,) = re.findall(r"950/1000 \[00:01<00:0(\d), ", terminal.getvalue())
    assert 1 <= int(left) <= 3
