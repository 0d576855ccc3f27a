"""Two runs on the same items: what changed, how surely, and which items went from right to wrong and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

from tasks.metrics.bootstrap import Figures, Interval, Resampling, answer_figures, caption_figures, paired_intervals
from tasks.metrics.captions import score_captions
from tasks.metrics.listing import aligned, software
from tasks.metrics.vqa import GradedQuestion, Predictions, QuestionId, VqaScorer, named_accuracies, score_answers

__all__ = ["ANSWER_IS_RIGHT", "CAPTION_IS_RIGHT", "Comparison", "Difference", "Flip", "compare_answers", "compare_captions", "comparison_table"]

Item = TypeVar("Item", bound=QuestionId)

# From which figure on an item counts as right. An answer: at least two of ten people gave it. A caption: a CIDEr of 1, about what one
# person's caption reaches against those of others (corpus CIDEr of human captions is near 0.9).
ANSWER_IS_RIGHT = 50.0
CAPTION_IS_RIGHT = 1.0


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A corpus figure of both runs; interval is that of after - before, paired, None without resamples."""

    name: str
    before: float
    after: float
    interval: Interval | None

    @property
    def is_sure(self) -> bool:
        """True where the interval of the difference does not hold zero."""
        return self.interval is not None and not self.interval.low <= 0 <= self.interval.high


@dataclass(frozen=True, kw_only=True)
class Flip:
    """One item that changed sides: what each run said, and its figure (CIDEr, or accuracy in percent)."""

    item: QuestionId
    said_before: str
    said_after: str
    before: float
    after: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two runs on the same items.

    differences     every corpus figure, those of types included
    right_to_wrong  the greatest loss first
    wrong_to_right  the greatest gain first
    scorer          what computed the figures, with its version
    """

    n_items: int
    right_from: float
    differences: Sequence[Difference]
    right_to_wrong: Sequence[Flip]
    wrong_to_right: Sequence[Flip]
    scorer: str

    @property
    def negative_flip_rate(self) -> float:
        """Share of all items that were right before and are wrong now (MUSCLE: Echterhoff et al. 2024, arXiv 2407.09435)."""
        return len(self.right_to_wrong) / self.n_items

    @property
    def positive_flip_rate(self) -> float:
        """Share of all items that were wrong before and are right now."""
        return len(self.wrong_to_right) / self.n_items


def compare_captions(
    before: Mapping[int, str],
    after: Mapping[int, str],
    references: Mapping[int, Sequence[str]],
    *,
    resampling: Resampling | None = None,
    right_from: float = CAPTION_IS_RIGHT,
) -> Comparison:
    """The captions of two runs.

    right_from   an image is right from this CIDEr on

    Raises DataError where one of the runs is not for exactly the images of the references.
    """
    scores = score_captions(before, references), score_captions(after, references)
    items = [{image: row["CIDEr"] for image, row in run.per_image.items()} for run in scores]
    flips = _flips(before, after, items[0], items[1], right_from)
    return Comparison(
        n_items=len(references),
        right_from=right_from,
        differences=_differences([run.corpus for run in scores], [caption_figures(run) for run in scores], resampling or Resampling()),
        right_to_wrong=flips[0],
        wrong_to_right=flips[1],
        scorer=scores[0].scorer,
    )


def compare_answers(
    before: Predictions,
    after: Predictions,
    questions: Sequence[GradedQuestion],
    *,
    scorer: VqaScorer = "official",
    resampling: Resampling | None = None,
    right_from: float = ANSWER_IS_RIGHT,
) -> Comparison:
    """The answers of two runs.

    right_from   a question is right from this accuracy on, in percent

    Raises DataError where one of the runs does not answer exactly these questions.
    """
    scores = score_answers(before, questions, scorer), score_answers(after, questions, scorer)
    said = cast("Mapping[QuestionId, str]", before), cast("Mapping[QuestionId, str]", after)
    flips = _flips(said[0], said[1], scores[0].per_question, scores[1].per_question, right_from)
    figures = [answer_figures(run, questions) for run in scores]
    return Comparison(
        n_items=len(questions),
        right_from=right_from,
        differences=_differences([named_accuracies(run) for run in scores], figures, resampling or Resampling()),
        right_to_wrong=flips[0],
        wrong_to_right=flips[1],
        scorer=scores[0].scorer,
    )


def comparison_table(comparison: Comparison, unit: str, *, most_types: int = 10) -> str:
    """Lines for the screen: every figure with its difference, then the flips; unit is "images" or "questions".

    most_types   question types shown, those with the greatest changes first
    """
    level = "paired interval"
    by_question_type = [row for row in comparison.differences if row.name.startswith("question type")]
    shown = [row for row in comparison.differences if row not in by_question_type]
    shown += sorted(by_question_type, key=lambda row: -abs(row.after - row.before))[:most_types]
    rows = [("figure", "before", "after", "difference", level, "")]
    for row in shown:
        between = f"{row.interval.low:+.4f} .. {row.interval.high:+.4f}" if row.interval else ""
        numbers = (f"{row.before:.4f}", f"{row.after:.4f}", f"{row.after - row.before:+.4f}")
        rows.append((row.name, *numbers, between, "*" if row.is_sure else ""))
    lines = [f"scorer: {comparison.scorer}; computed by {software()}", f"{comparison.n_items} {unit}; * where the interval does not hold zero", ""]
    lines += aligned(rows)
    if hidden := len(by_question_type) - most_types:
        lines += [f"and {hidden} question types that changed less"] if hidden > 0 else []
    for name, flips, rate in (
        ("right to wrong", comparison.right_to_wrong, comparison.negative_flip_rate),
        ("wrong to right", comparison.wrong_to_right, comparison.positive_flip_rate),
    ):
        lines += ["", f"{name}: {len(flips)} {unit}, {100 * rate:.2f} % (right from {comparison.right_from:g} on)"]
        lines += [f"  {flip.item}: {flip.said_before!r} ({flip.before:.2f}) -> {flip.said_after!r} ({flip.after:.2f})" for flip in flips[:5]]
    return "\n".join(lines)


def _differences(corpora: Sequence[Mapping[str, float]], figures: Sequence[Figures], resampling: Resampling) -> list[Difference]:
    before, after = corpora
    found = paired_intervals(figures[0], figures[1], resampling)
    return [Difference(name=name, before=value, after=after[name], interval=found.get(name)) for name, value in before.items()]


def _flips(
    said_before: Mapping[Item, str], said_after: Mapping[Item, str], before: Mapping[Item, float], after: Mapping[Item, float], right_from: float
) -> tuple[list[Flip], list[Flip]]:
    """Items that changed sides: (right to wrong, wrong to right)."""
    changed = [
        Flip(item=item, said_before=said_before[item], said_after=said_after[item], before=figure, after=after[item])
        for item, figure in before.items()
        if (figure >= right_from) != (after[item] >= right_from)
    ]
    changed.sort(key=lambda flip: flip.after - flip.before)
    return [flip for flip in changed if flip.before >= right_from], [flip for flip in reversed(changed) if flip.after >= right_from]
