"""Two runs on the same items: what changed, how surely, and which items went from right to wrong and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

from tasks.metrics.bootstrap import Figures, Interval, Resampling, answer_figures, caption_figures, paired_intervals
from tasks.metrics.captions import score_captions
from tasks.metrics.vqa import (
    GradedQuestion,
    Predictions,
    QuestionId,
    VqaScorer,
    few_answers_note,
    fitting_scorer,
    named_accuracies,
    score_answers,
)

__all__ = ["ANSWER_IS_RIGHT", "CAPTION_IS_RIGHT", "Comparison", "Difference", "Pair", "compare_answers", "compare_captions"]

Item = TypeVar("Item", bound=QuestionId)

# From which figure on an item counts as right. An answer: at least two of ten people gave it. A caption: a CIDEr of 100 percent, about what one
# person's caption reaches against those of others (corpus CIDEr of human captions is near 90 percent).
ANSWER_IS_RIGHT = 50.0
CAPTION_IS_RIGHT = 100.0
_NOTHING = 1e-9  # percent; BLEU of no word in common is a little above 0


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A corpus figure of both runs in percent, of n items; interval is that of after - before, paired, None without resamples or for one item."""

    name: str
    n: int
    before: float
    after: float
    interval: Interval | None

    @property
    def is_sure(self) -> bool:
        """True where the interval of the difference does not hold zero."""
        return self.interval is not None and (self.interval.low > _NOTHING or self.interval.high < -_NOTHING)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One item in both runs: what each said, and its figure (CIDEr or accuracy, in percent)."""

    item: QuestionId
    said_before: str
    said_after: str
    before: float
    after: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two runs on the same items.

    unit         what an item is: "images" or "questions"
    pairs        every item, in the order of the data set
    differences  every corpus figure, those of types included
    right_from   the figure from which on an item counts as right
    scorer       what computed the figures, with its version
    notes        sentences about what was scored
    """

    unit: str
    pairs: Sequence[Pair]
    differences: Sequence[Difference]
    right_from: float
    scorer: str
    notes: Sequence[str] = ()

    @property
    def right_to_wrong(self) -> list[Pair]:
        """Items that only the first run has right, the greatest loss first."""
        lost = [pair for pair in self.pairs if pair.after < self.right_from <= pair.before]
        return sorted(lost, key=lambda pair: pair.after - pair.before)

    @property
    def wrong_to_right(self) -> list[Pair]:
        """Items that only the second run has right, the greatest gain first."""
        gained = [pair for pair in self.pairs if pair.before < self.right_from <= pair.after]
        return sorted(gained, key=lambda pair: pair.before - pair.after)

    @property
    def negative_flip_rate(self) -> float:
        """Share of all items that were right before and are wrong now (MUSCLE: Echterhoff et al. 2024, arXiv 2407.09435)."""
        return len(self.right_to_wrong) / len(self.pairs)

    @property
    def positive_flip_rate(self) -> float:
        """Share of all items that were wrong before and are right now."""
        return len(self.wrong_to_right) / len(self.pairs)


def compare_captions(
    before: Mapping[int, str],
    after: Mapping[int, str],
    references: Mapping[int, Sequence[str]],
    *,
    resampling: Resampling | None = None,
    right_from: float = CAPTION_IS_RIGHT,
) -> Comparison:
    """The captions of two runs.

    right_from   an image is right from this CIDEr on, in percent

    Raises DataError where one of the runs is not for exactly the images of the references.
    """
    scores = score_captions(before, references), score_captions(after, references)
    items = [{image: 100 * row["CIDEr"] for image, row in run.per_image.items()} for run in scores]
    corpora = [{name: 100 * value for name, value in run.corpus.items()} for run in scores]
    figures = [caption_figures(run).chosen(tuple(run.corpus), scale=100) for run in scores]
    return Comparison(
        unit="images",
        pairs=_pairs(before, after, items[0], items[1]),
        differences=_differences(corpora, figures, resampling or Resampling()),
        right_from=right_from,
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

    scorer       gives way to `exact` where most of the questions have too few answers for it
    right_from   a question is right from this accuracy on, in percent

    Raises DataError where one of the runs does not answer exactly these questions.
    """
    fitting = fitting_scorer(scorer, questions)
    scores = score_answers(before, questions, fitting), score_answers(after, questions, fitting)
    said = cast("Mapping[QuestionId, str]", before), cast("Mapping[QuestionId, str]", after)
    figures = [answer_figures(run, questions) for run in scores]
    return Comparison(
        unit="questions",
        pairs=_pairs(said[0], said[1], scores[0].per_question, scores[1].per_question),
        differences=_differences([named_accuracies(run) for run in scores], figures, resampling or Resampling()),
        right_from=right_from,
        scorer=scores[0].scorer,
        notes=few_answers_note(scorer, questions),
    )


def _differences(corpora: Sequence[Mapping[str, float]], figures: Sequence[Figures], resampling: Resampling) -> list[Difference]:
    before, after = corpora
    found = paired_intervals(figures[0], figures[1], resampling)
    return [Difference(name=name, n=figures[0].n_of(name), before=value, after=after[name], interval=found.get(name)) for name, value in before.items()]


def _pairs(
    said_before: Mapping[Item, str], said_after: Mapping[Item, str], before: Mapping[Item, float], after: Mapping[Item, float]
) -> list[Pair]:
    return [
        Pair(item=item, said_before=said_before[item], said_after=said_after[item], before=figure, after=after[item])
        for item, figure in before.items()
    ]
