"""How far a long loop is: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

__all__ = ["StepProgress", "progress"]

T = TypeVar("T")


def progress(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """The items, with a bar on a terminal and nothing in a log file. total: how many, where the items do not say it."""
    yield from tqdm(items, desc=label, total=total, unit="batch", leave=False, disable=None, dynamic_ncols=True)


class StepProgress:
    """Training steps: a bar with loss, rate and time left on a terminal; a line each time that something is logged elsewhere."""

    def __init__(self, *, first: int, last: int, is_shown: bool) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._is_shown, self._last, self._first = is_shown, last, first
        self._started = time.perf_counter()
        self._bar = tqdm(total=last, initial=first, desc="training", unit="step", dynamic_ncols=True, disable=not (is_shown and self._is_terminal))

    def step(self) -> None:
        """One step is done."""
        self._bar.update()

    def logged(self, step: int, loss: float, rate: float) -> None:
        """Say how the training goes."""
        self._bar.set_postfix(loss=f"{loss:.3f}", rate=f"{rate:.1e}")
        if self._is_shown and not self._is_terminal:
            speed = (step - self._first) / max(time.perf_counter() - self._started, 1e-9)
            left = (self._last - step) / speed if speed else 0.0
            print(f"step {step}/{self._last}  loss {loss:.3f}  rate {rate:.1e}  {speed:.2f} steps/s  {left:.0f} s left", file=sys.stderr)

    def close(self) -> None:
        """Leave the line."""
        self._bar.close()
