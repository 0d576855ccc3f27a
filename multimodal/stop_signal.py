"""SIGTERM, which a cluster sends some seconds before it takes the machine away: noted, so that a step can end and be saved."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

__all__ = ["StopSignal", "sigterm_noted"]


class StopSignal:
    """Whether this process was asked to end."""

    def __init__(self) -> None:
        self.is_set = False

    def note(self, number: int, frame: FrameType | None) -> None:
        """A signal handler."""
        self.is_set = True


@contextlib.contextmanager
def sigterm_noted() -> Iterator[StopSignal]:
    """Inside the block SIGTERM ends nothing and is noted; outside of a program's main thread, where no signal arrives, nothing changes."""
    stop = StopSignal()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGTERM, stop.note)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
