"""Tables on the screen."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["results_table"]


def results_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """One line for each row, one column for each figure, two decimals."""
    columns = list(dict.fromkeys(name for figures in rows.values() for name in figures))
    cells = [["", *columns], *([name, *(f"{figures[c]:.2f}" if c in figures else "" for c in columns)] for name, figures in rows.items())]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns) + 1)]
    lines = ["  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))) for row in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
