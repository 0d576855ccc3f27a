"""What was found: a ratio for each repetition, and the target that it is held against."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Literal

__all__ = ["Finding"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One row of the table.

    ratios   one for each repetition
    target   what the ratio should be, at least or at most; None where nothing is aimed at
    detail   what the ratio is of, in absolute figures
    """

    part: str
    what: str
    ratios: tuple[float, ...]
    target: float | None = None
    sense: Literal["at least", "at most"] = "at least"
    detail: str = ""

    @property
    def median(self) -> float:
        """Of the ratios."""
        return statistics.median(self.ratios)

    @property
    def verdict(self) -> str:
        """met, missed by how much, or nothing where nothing is aimed at."""
        if self.target is None or not self.ratios:
            return ""
        is_met = self.median >= self.target if self.sense == "at least" else self.median <= self.target
        return "met" if is_met else f"missed by {100 * abs(self.median / self.target - 1):.1f} %"
