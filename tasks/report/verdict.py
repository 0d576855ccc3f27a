"""What the score of one picture means, as a sign, a word and a colour: never the colour alone."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["Verdict", "answer_verdict", "caption_verdicts"]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """`tone` colours the badge; `sign`, `word` and `figure` stand in it; people filter the page by `word`."""

    tone: Literal["good", "fair", "bad", "none"]
    sign: str
    word: str
    figure: str = ""


UNSCORED = Verdict(tone="none", sign="–", word="not scored")


def answer_verdict(score: float | None) -> Verdict:
    """A VQA accuracy in 0..1: 1.0 -> right, 0.6 -> partly right, 0.0 -> wrong."""
    if score is None:
        return UNSCORED
    figure = f"{100 * score:.3g} %"
    if score >= 1:
        return Verdict(tone="good", sign="✓", word="right", figure=figure)
    if score > 0:
        return Verdict(tone="fair", sign="◐", word="partly right", figure=figure)
    return Verdict(tone="bad", sign="✗", word="wrong", figure=figure)


def caption_verdicts(scores: Sequence[float | None]) -> list[Verdict]:
    """Each caption against the others on the page, by thirds: 0.1, 0.5, 2.0 -> lower, middle, higher.

    A caption score has no mark for right, so a sign by itself would claim more than the score says. Equal scores share their
    middle rank; but the lowest score is lower however many share it (most CIDEr-D scores of a weak model are 0), unless all are equal.
    """
    known = sorted(score for score in scores if score is not None)
    return [UNSCORED if score is None else _third(score, known) for score in scores]


def _third(score: float, known: Sequence[float]) -> Verdict:
    rank = (bisect_left(known, score) + bisect_right(known, score)) / (2 * len(known))
    figure = f"{score:.3f}"
    if rank > 2 / 3:
        return Verdict(tone="good", sign="▲", word="higher", figure=figure)
    if rank < 1 / 3 or known[0] == score < known[-1]:
        return Verdict(tone="bad", sign="▼", word="lower", figure=figure)
    return Verdict(tone="fair", sign="●", word="middle", figure=figure)
