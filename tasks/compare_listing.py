"""A comparison of two runs as a table for people, as JSON for machines, and item by item."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from adalink.atomic import write_whole
from tasks.compare import Comparison, Difference, Pair
from tasks.metrics.listing import aligned, software

__all__ = ["comparison_json", "comparison_table", "shown_differences", "write_pairs"]

_MOST_TYPES = 10  # question types in a table, those with the greatest changes; VQAv2 has 65
_MOST_FLIPS = 5  # of each direction on the screen; the report shows more, with pictures


def comparison_table(comparison: Comparison) -> str:
    """Lines for the screen: every figure with its difference and paired interval, then the flips."""
    rows = [("metric, in percent", "n", "before", "after", "difference", "95 % paired interval", "")]
    shown, hidden = shown_differences(comparison)
    for row in shown:
        between = f"{row.interval.low:+.4f} .. {row.interval.high:+.4f}" if row.interval else ""
        rows.append((row.name, f"{row.n:,}", f"{row.before:.4f}", f"{row.after:.4f}", f"{row.after - row.before:+.4f}", between, "*" if row.is_sure else ""))
    lines = [
        f"scorer: {comparison.scorer}; computed by {software()}",
        f"{len(comparison.pairs)} {comparison.unit}; * where the interval does not hold zero",
        *comparison.notes,
        "",
        *aligned(rows),
    ]
    if hidden:
        lines.append(f"and {hidden} question types that changed less")
    lines += _flip_lines(comparison, "right to wrong", comparison.right_to_wrong, comparison.negative_flip_rate, "negative")
    lines += _flip_lines(comparison, "wrong to right", comparison.wrong_to_right, comparison.positive_flip_rate, "positive")
    return "\n".join(lines)


def shown_differences(comparison: Comparison) -> tuple[list[Difference], int]:
    """The rows of a table, and how many question types with lesser changes are left out of it."""
    by_question = [row for row in comparison.differences if row.name.startswith("question type")]
    shown = [row for row in comparison.differences if row not in by_question]
    by_question.sort(key=lambda row: -abs(row.after - row.before))
    return shown + by_question[:_MOST_TYPES], max(0, len(by_question) - _MOST_TYPES)


def comparison_json(comparison: Comparison) -> str:
    """One object: software, scorer, n_items, figures by name (before, after, difference, interval), and the flips with their rates."""
    figures = {
        row.name: {
            "n": row.n,
            "before": row.before,
            "after": row.after,
            "difference": row.after - row.before,
            "interval": [row.interval.low, row.interval.high] if row.interval else None,
        }
        for row in comparison.differences
    }
    document = {
        "software": software(),
        "scorer": comparison.scorer,
        "n_items": len(comparison.pairs),
        "unit": comparison.unit,
        "notes": list(comparison.notes),
        "figures": figures,
        "right_from": comparison.right_from,
        "negative_flip_rate": comparison.negative_flip_rate,
        "positive_flip_rate": comparison.positive_flip_rate,
        "right_to_wrong": [vars(pair) for pair in comparison.right_to_wrong],
        "wrong_to_right": [vars(pair) for pair in comparison.wrong_to_right],
    }
    return json.dumps(document, indent=2)


def write_pairs(path: Path, comparison: Comparison) -> None:
    """Every item with what both runs said and its two figures, as JSON."""
    write_whole(path, (json.dumps([vars(pair) for pair in comparison.pairs], indent=1) + "\n").encode("ascii"))


def _flip_lines(comparison: Comparison, name: str, flips: Sequence[Pair], rate: float, sign: str) -> list[str]:
    right = f"right from {comparison.right_from:g} on"
    lines = ["", f"{name}: {len(flips)} of {len(comparison.pairs)} {comparison.unit}, {sign} flip rate {100 * rate:.2f} % ({right})"]
    return lines + [f"  {flip.item}: {flip.said_before!r} ({flip.before:.2f}) -> {flip.said_after!r} ({flip.after:.2f})" for flip in flips[:_MOST_FLIPS]]
