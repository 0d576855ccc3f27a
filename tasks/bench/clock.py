"""Sides that take turns, so that whatever else the machine does hits all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from adalink.errors import DataError

__all__ = ["Turns", "alternate", "seconds_on"]

LOSS_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}  # relative; other dtypes 2e-2


@dataclass(frozen=True, kw_only=True)
class Turns:
    """Seconds of each side in each repetition, as `seconds_on` counts them."""

    seconds: Mapping[str, tuple[float, ...]]

    def ratios(self, slow: str, fast: str) -> tuple[float, ...]:
        """How many times as long the slow side took, for each repetition."""
        return tuple(a / b for a, b in zip(self.seconds[slow], self.seconds[fast], strict=True))

    def median(self, side: str) -> float:
        """Seconds."""
        return statistics.median(self.seconds[side])


def alternate(
    sides: Mapping[str, Callable[[], float]],
    repetitions: int,
    device: torch.device,
    dtype: torch.dtype,
    tolerance: float | None = None,
    now: Callable[[], float] | None = None,
) -> Turns:
    """Runs the sides in turn, every other time in reverse; the first round warms up and is not counted.

    now: another clock, for sides that work in processes of their own. Each side gives a number, its loss. Raises DataError where those
    of the first round differ by more than a rounding of the dtype (or by `tolerance`, relative): then no ratio means anything.
    """
    first = {name: side() for name, side in sides.items()}
    allowed = LOSS_TOLERANCE.get(dtype, 2e-2) if tolerance is None else tolerance
    if max(first.values()) - min(first.values()) > allowed * max(map(abs, first.values())):
        raise DataError(
            f"the sides of one measurement give {first}, expected the same: a defect of adalink or of its peer, please report it"
        )
    clock = now or partial(seconds_on, device)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repetitions):
        for name in list(sides)[:: -1 if turn % 2 else 1]:
            started = clock()
            sides[name]()
            seconds[name].append(clock() - started)
    return Turns(seconds={name: tuple(values) for name, values in seconds.items()})


def seconds_on(device: torch.device) -> float:
    """Seconds up to now: of the processor and all threads of this process on a CPU, which other work disturbs less; by the clock on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()
