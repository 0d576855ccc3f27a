"""One axis of a plot: the range it covers, its ticks and their labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Axis", "exact_axis", "round_axis"]

# A range narrower than this share of its values is drawn as flat: ticks inside it could not be told apart in float64.
FLAT = 1e-9
SMALLEST = 1e-290


@dataclass(frozen=True, kw_only=True)
class Axis:
    """The range [low, high], low < high, and the ticks within it, each with its label."""

    low: float
    high: float
    ticks: tuple[float, ...]
    labels: tuple[str, ...]

    def place(self, value: float, start: float, end: float) -> float:
        """Where `value` lies between `start` (at low) and `end` (at high)."""
        return start + (end - start) * ((value - self.low) / (self.high - self.low))


def round_axis(values: Sequence[float], n_ticks: int) -> Axis:
    """An axis that begins and ends on a tick: 0.31, 5.8 with 4 ticks -> 0, 2, 4, 6."""
    low, high = _spread(values)
    step = _step(high - low, n_ticks, 0.0)
    low, high = math.floor(low / step + FLAT) * step, math.ceil(high / step - FLAT) * step
    return _axis(low, high, step)


def exact_axis(values: Sequence[float], n_ticks: int) -> Axis:
    """An axis that begins and ends on the first and last value, ticks inside: 0, 950 with 4 ticks -> 0, 200, 400, 600, 800.

    Whole values (training steps) get no tick between two of them.
    """
    low, high = _spread(values)
    return _axis(low, high, _step(high - low, n_ticks, 1.0 if all(float(v).is_integer() for v in values) else 0.0))


def _spread(values: Sequence[float]) -> tuple[float, float]:
    """The range of the values, opened where they are all the same: 3, 3 -> 2, 4, and 0 -> -1, 1, and 1e-4 -> 0, 2e-4."""
    low, high = min(values), max(values)
    size = max(abs(low), abs(high))
    if high - low > max(FLAT * size, SMALLEST):
        return low, high
    room = 1.0 if size < SMALLEST or size >= 1 else size
    room = max(room, 1e-3 * size)
    return low - room, high + room


def _step(span: float, n_ticks: int, smallest: float) -> float:
    """The least of 1, 2, 5 times a power of ten that leaves at most `n_ticks` intervals."""
    power = 10.0 ** math.floor(math.log10(span / n_ticks))
    return max(smallest, next(power * m for m in (1, 2, 5, 10, 20) if span / (power * m) <= n_ticks + FLAT))


def _axis(low: float, high: float, step: float) -> Axis:
    first, last = math.ceil(low / step - FLAT), math.floor(high / step + FLAT)
    ticks = tuple(i * step for i in range(first, last + 1))
    size = max(abs(low), abs(high))
    return Axis(low=low, high=high, ticks=ticks, labels=tuple(_label(tick, step, size) for tick in ticks))


def _label(value: float, step: float, size: float) -> str:
    """As many digits as tell two ticks apart: 2000 -> 2,000, and 0.25 -> 0.25, and 0.00025 -> 2.5e-4, and 3000000 -> 3M."""
    if abs(value) < step / 2:
        return "0"
    decimals = max(0, -math.floor(math.log10(step) + FLAT))
    if size < 1e6 and decimals <= 3:
        return f"{value:,.{decimals}f}"
    if size < 1e9 and step >= 1e4:
        return f"{value / 1e6:.{max(0, 6 - math.floor(math.log10(step) + FLAT))}f}M"
    digits = max(0, math.floor(math.log10(abs(value)) + FLAT) - math.floor(math.log10(step) + FLAT))
    mantissa, exponent = f"{value:.{digits}e}".split("e")
    return f"{mantissa}e{int(exponent)}"
