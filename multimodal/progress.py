"""How far a long loop is: a bar on a terminal, a line every half minute in a log file."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import TypeVar

from tqdm import tqdm

__all__ = ["StepProgress", "progress"]

T = TypeVar("T")

EVERY = 30.0  # seconds between two lines where there is no terminal


def progress(items: Iterable[T], label: str, total: int | None = None, *, unit: str = "batches") -> Iterator[T]:
    """The items, with a bar on a terminal, and a line every half minute in a log file. total: how many, where the items do not say it."""
    if sys.stderr.isatty():
        yield from tqdm(items, desc=label, total=total, unit=f" {unit}", leave=False, dynamic_ncols=True)
        return
    if total is None and isinstance(items, Sized):
        total = len(items)
    started = stated = time.monotonic()
    for number, item in enumerate(items):
        if (now := time.monotonic()) - stated >= EVERY and _is_main():
            stated, left = now, f", {(now - started) / number * (total - number):.0f} s left" if total and number else ""
            print(f"{label}: {number} of {total if total is not None else 'unknown'} {unit}{left}", file=sys.stderr)
        yield item


def _is_main() -> bool:
    """Whether this process, of those that a launcher started together, is the first."""
    return os.environ.get("RANK", "0") == "0"


class StepProgress:
    """Training steps: a bar with loss, rate and time left on a terminal; elsewhere a line each time that something is logged, and every half minute."""

    def __init__(self, *, first: int, last: int, is_visible: bool) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._is_visible, self._last, self._first, self._step = is_visible, last, first, first
        self._started = self._stated = time.monotonic()
        self._bar = tqdm(total=last, initial=first, desc="training", unit="step", dynamic_ncols=True, disable=not (is_visible and self._is_terminal))

    def step(self) -> None:
        """One step is done."""
        self._step += 1
        self._bar.update()
        if time.monotonic() - self._stated >= EVERY:
            self._log("")

    def logged(self, step: int, loss: float, rate: float) -> None:
        """Say how the training goes."""
        self._bar.set_postfix(loss=f"{loss:.3f}", rate=f"{rate:.1e}")
        self._log(f"loss {loss:.3f}  learning rate {rate:.1e}  ")

    def measured(self, step: int, metrics: Mapping[str, float], is_best: bool) -> None:
        """Say what was measured."""
        if self._is_visible and metrics:
            best = "  best so far" if is_best else ""
            line = f"step {step}/{self._last}  validation: {'  '.join(f'{name} {value:.3f}' for name, value in metrics.items())}{best}"
            tqdm.write(line, file=sys.stderr)

    def _log(self, what: str) -> None:
        if self._is_visible and not self._is_terminal:
            self._stated = time.monotonic()
            speed = (self._step - self._first) / max(self._stated - self._started, 1e-9)
            left = (self._last - self._step) / speed if speed else 0.0
            print(f"step {self._step}/{self._last}  {what}{speed:.2f} steps/s  {left:.0f} s left", file=sys.stderr)

    def close(self) -> None:
        """Leave the line."""
        self._bar.close()
