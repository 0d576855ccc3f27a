"""Figures with their intervals and scorers, as a table for people and as JSON for machines."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from tasks.metrics.bootstrap import Interval, Resampling

__all__ = ["Figure", "Listing", "aligned", "as_json", "as_table", "software"]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One number of a corpus.

    value     in the unit of the official code: a fraction for captions (CIDEr of 10), percent for answers
    scale     what makes it percent, as papers and all other commands have it
    scorer    what computed it, with its version
    interval  None where none was asked for or none can be found
    """

    name: str
    value: float
    scorer: str
    scale: float = 1.0
    interval: Interval | None = None

    @property
    def percent(self) -> float:
        """The value in percent."""
        return self.scale * self.value


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What a file of results scored.

    source   what was compared with what, for the heading: {"references": "captions_val2014.json", ...}
    unit     of what: "images" or "questions"
    notes    sentences about what was scored
    """

    source: Mapping[str, str]
    n_items: int
    unit: str
    figures: Sequence[Figure]
    resampling: Resampling
    notes: Sequence[str] = ()


def software() -> str:
    """This package with its version, which stands beside every figure."""
    try:
        return f"adalink {version('adalink')}"
    except PackageNotFoundError:  # run from a folder that was never installed
        return "adalink (not installed)"


def as_table(listing: Listing) -> str:
    """Lines for the screen; the scorers stand above the figures that they made."""
    lines = [f"{name}: {value}" for name, value in listing.source.items()]
    lines.append(f"{listing.n_items} {listing.unit}; computed by {software()}")
    lines += listing.notes
    level = f"{100 * listing.resampling.level:g} % interval"
    for scorer in dict.fromkeys(figure.scorer for figure in listing.figures):
        figures = [figure for figure in listing.figures if figure.scorer == scorer]
        rows: list[tuple[str, ...]] = [("figure", "value", level, "in percent")]
        for figure in figures:
            between = f"{figure.interval.low:.4f} .. {figure.interval.high:.4f}" if figure.interval else ""
            rows.append((figure.name, f"{figure.value:.4f}", between, f"{figure.percent:.2f}"))
        if all(figure.scale == 1 for figure in figures):  # they are percent
            rows = [row[:3] for row in rows]
        lines += ["", f"scorer: {scorer}", *aligned(rows)]
    return "\n".join(lines)


def as_json(listing: Listing) -> str:
    """One object: software, source, n_items, resampling, notes, and figures by name.

    Each has its value and interval (low, high, or null) in the unit of the official code, the value in percent, and the scorer.
    """
    figures = {
        figure.name: {
            "value": figure.value,
            "percent": figure.percent,
            "interval": [figure.interval.low, figure.interval.high] if figure.interval else None,
            "scorer": figure.scorer,
        }
        for figure in listing.figures
    }
    about = {"software": software(), **listing.source, "n_items": listing.n_items, "unit": listing.unit, "resampling": vars(listing.resampling)}
    return json.dumps({**about, "notes": list(listing.notes), "figures": figures}, indent=2)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines, the first column to the left and the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
