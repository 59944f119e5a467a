"""The memory that tests and benchmarks measure is the most that there was."""

from __future__ import annotations

import subprocess
import sys

from benchmarks.measure import ended
from tests.models import ROOT

STAGES = """
from moequant.progress import Meter
from tests.peak import watched
memory = watched()
base = memory()
with Meter().stage("one"):
    bytearray(200 << 20)
with Meter().stage("two"):
    pass
first, second = memory(), memory()
print(first - base >> 20, second - base >> 20)
"""


def test_a_peak_is_not_forgotten_with_its_stage_and_not_told_twice() -> None:
    ran = subprocess.run([sys.executable, "-c", STAGES], cwd=ROOT, capture_output=True, text=True, check=True)
    first, second = map(int, ran.stdout.split())
    assert 195 <= first < 260 and second < 40


def test_a_child_has_not_the_memory_of_who_starts_it_and_keeps_that_of_its_first_stage() -> None:
    ours = bytearray(400 << 20)
    of_stages = "import time; x = bytearray(200 << 20); time.sleep(0.2); del x; " + (
        "open('/proc/self/clear_refs', 'w').write('5'); time.sleep(0.1)"
    )
    for code, least, most in ((of_stages, 200, 260), ("import time; time.sleep(0.2)", 1, 60)):
        started = subprocess.Popen([sys.executable, "-c", code])
        status, used, peak = ended(started.pid)
        started.returncode = status
        assert status == 0 and least <= peak >> 20 < most
        assert used.ru_maxrss >> 10 >= len(ours) >> 20, "what the system says is the parent's"
