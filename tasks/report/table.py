"""The metric table: one column for each metric that any row has, numbers of a column written alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Cell", "columns", "metric_cells"]


_NOTHING = 1e-6  # BLEU of no word in common is a little above 0, by the constants that it adds


@dataclass(frozen=True, kw_only=True)
class Cell:
    """The figure as written, and the length of its bar: its share of the largest of its column, 0..100, or None where no bar fits."""

    text: str
    bar: float | None = None


def columns(rows: Sequence[Mapping[str, float | None]]) -> list[str]:
    """The metrics of all rows, in the order in which they first come."""
    return list(dict.fromkeys(name for row in rows for name in row))


def metric_cells(rows: Sequence[Mapping[str, float | None]]) -> list[list[Cell]]:
    """One list of cells a row, in the order of `columns`: a metric that a row lacks (or has as None) is `–`."""
    by_column = [_column([row.get(name) for row in rows]) for name in columns(rows)]
    return [[column[i] for column in by_column] for i in range(len(rows))]


def _column(values: Sequence[float | None]) -> list[Cell]:
    values = [0.0 if value is not None and abs(value) < _NOTHING else value for value in values]
    finite = [float(value) for value in values if value is not None and math.isfinite(value)]
    largest = max(map(abs, finite), default=0.0)
    has_bars = largest > 0 and all(value >= 0 for value in finite)
    return [_cell(value, largest, has_bars) for value in values]


def _cell(value: float | None, largest: float, has_bars: bool) -> Cell:
    if value is None:
        return Cell(text="–")
    if not math.isfinite(value):
        return Cell(text="not a number" if math.isnan(value) else "∞" if value > 0 else "-∞")
    decimals = 1 if largest >= 100 else 2 if largest >= 10 or largest == 0 else 3
    text = f"{value:,.{decimals}f}" if largest == 0 or 1e-2 <= largest < 1e9 else f"{value:.3g}"
    return Cell(text=text, bar=round(100 * value / largest, 1) if has_bars else None)
