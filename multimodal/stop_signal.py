"""SIGTERM, which a cluster sends some seconds before it takes the machine away, and Ctrl-C: noted, so that a step can end and be saved."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

__all__ = ["StopSignal", "interrupts_noted", "sigterm_noted"]

_NOTED = b"\nadalink: Ctrl-C: the step is finished and saved first; press it again to stop at once\n"


class StopSignal:
    """The signal by which this process was asked to end; 0 where it was not."""

    def __init__(self) -> None:
        self.number = 0

    def note(self, number: int, frame: FrameType | None) -> None:
        """A signal handler. Raises KeyboardInterrupt at the second Ctrl-C."""
        if number == signal.SIGINT == self.number:
            raise KeyboardInterrupt
        if number == signal.SIGINT:
            os.write(2, _NOTED)  # print is not for signal handlers
        self.number = number


@contextlib.contextmanager
def sigterm_noted() -> Iterator[StopSignal]:
    """Inside the block SIGTERM ends nothing and is noted; outside of a program's main thread, where no signal arrives, nothing changes."""
    stop = StopSignal()
    with _handled(signal.SIGTERM, stop):
        yield stop


@contextlib.contextmanager
def interrupts_noted(stop: StopSignal) -> Iterator[None]:
    """Inside the block, the steps of a training, Ctrl-C is noted too, once; a program that handles it in its own way keeps that."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        with _handled(signal.SIGINT, stop):
            yield
    else:
        yield


@contextlib.contextmanager
def _handled(number: signal.Signals, stop: StopSignal) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, stop.note)
    try:
        yield
    finally:
        signal.signal(number, before)
