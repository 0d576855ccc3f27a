"""The figures of an evaluation in an adapter's model card, each with its scorer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from adalink.atomic import write_whole
from tasks.metrics.bootstrap import Interval

__all__ = ["add_figures"]

_HEADING = "## Evaluation"


def add_figures(
    folder: Path, figures: Mapping[str, float], intervals: Mapping[str, Interval], *, scorer: str, software: str, data: str
) -> None:
    """Put a table of figures at the end of an adapter folder's README.md, in place of one that is there from before.

    scorer, software   what computed the figures, each with its version
    data               one line that says what was evaluated on, and on how many items
    """
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8").split(f"\n{_HEADING}\n")[0].rstrip("\n") if card.exists() else ""
    rows = []
    for name, value in figures.items():
        between = f"{intervals[name].low:.2f} .. {intervals[name].high:.2f}" if name in intervals else ""
        rows.append(f"| {name} | {value:.2f} | {between} | {scorer} |")
    table = "\n".join(["| figure | value | 95 % interval | scorer |", "|---|---|---|---|", *rows])
    write_whole(card, f"{text}\n\n{_HEADING}\n\nOn {data}; computed by {software}.\n\n{table}\n".encode())
