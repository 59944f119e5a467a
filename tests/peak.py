"""The most memory that this process had, whatever it does to what the system counts.

Each stage of a conversion lets Linux count anew (`progress.Meter`), and a peak before that is forgotten, by
`ru_maxrss` too. Python tells beforehand that the file which asks for it is opened.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from moequant.progress import peak_bytes

CLEAR = Path("/proc/self/clear_refs")


def watched() -> Callable[[], int]:
    """A function that tells the most bytes since its last call. For a process of its own: what watches stays
    until it ends."""
    most = 0

    def look() -> None:
        nonlocal most
        most = max(most, peak_bytes())

    def opened(event: str, args: tuple[object, ...]) -> None:
        if event == "open" and str(args[0]) == str(CLEAR):
            look()

    def peak() -> int:
        nonlocal most
        look()
        found, most = most, 0
        CLEAR.write_text("5")  # from its size now
        most = 0
        return found

    sys.addaudithook(opened)
    return peak
