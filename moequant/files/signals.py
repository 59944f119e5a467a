"""Signals that end a run: they unwind it like an error, so that everything is cleaned up."""

from __future__ import annotations

import signal
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(BaseException):
    """A signal came. Not an Exception: nothing but the outermost caller should catch it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def exit_code(self) -> int:
        """What shells expect of a process that a signal ended."""
        return 128 + self.number


@contextmanager
def interruptible() -> Iterator[None]:
    """While the block runs, the first signal raises Interrupted in it and later ones are ignored, until it is
    caught or lost: Python drops what is raised where it frees an object.

    Signals that are ignored already, as under nohup, stay so. Does nothing outside the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    changed = [number for number, handler in before.items() if handler is not signal.SIG_IGN]
    struck: weakref.ref[Interrupted] | None = None

    def strike(number: int, frame: FrameType | None) -> None:
        # Cleaning up must not be interrupted by a second one; terminals and supervisors send several.
        nonlocal struck
        if struck is not None and struck() is not None:
            return
        interrupted = Interrupted(number)
        struck = weakref.ref(interrupted)
        try:
            raise interrupted
        finally:
            del interrupted  # its traceback has this frame: it would hold itself

    for number in changed:
        signal.signal(number, strike)
    try:
        yield
    finally:
        for number in changed:
            signal.signal(number, before[number])
