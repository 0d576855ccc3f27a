"""The answers that a model may choose among: the most frequent ones of the training annotations, and what each would score."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from adalink.errors import DataError
from multimodal.progress import progress
from multimodal.sample import Question, Sample, SampleSource
from multimodal.shards import DamagedSample
from multimodal.template import Text
from tasks.metrics.vqa import VqaScorer, has_few_answers, score_answers
from tasks.metrics.vqa_words import clean, normalize
from tasks.vqa import Vqa, graded_question, learnt_questions, most_common

__all__ = ["AnswerVocabulary", "answer_vocabulary"]


@dataclass(frozen=True)
class AnswerVocabulary:
    """Answers that are different once normalised as the official evaluation does it, each spelled as people spell it most often.

    They are what the head of a model chooses among, in this order; `texts` is what such a model learns of a sample.
    """

    task: Vqa
    answers: tuple[str, ...]

    def texts(self, sample: Sample, rng: random.Random) -> Sequence[Text]:
        """The questions that the task takes, each with the scores of the answers that people gave."""
        return [Text(question.text, most_common(question), self.scores(question)) for question in learnt_questions(self.task, sample, rng)]

    def scores(self, question: Question) -> tuple[tuple[int, float], ...]:
        """(number of an answer, its VQA accuracy from above 0 to 1) for the answers that people gave; those outside are no target.

        Four of ten people or more: 1; three: 0.9; two: 0.6; one: 0.3. Each answer to a question that has too few for that: 1.
        """
        graded = graded_question(question)
        scorer: VqaScorer = "exact" if has_few_answers(graded) else "normalized"
        given = dict.fromkeys(normalize(clean(answer)) for answer in question.answers)
        known = {self._numbers[answer]: answer for answer in given if answer in self._numbers}
        scores = {number: score_answers({question.question_id: answer}, [graded], scorer).overall / 100 for number, answer in known.items()}
        return tuple((number, score) for number, score in scores.items() if score > 0)

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {normalize(clean(answer)): number for number, answer in enumerate(self.answers)}


def answer_vocabulary(task: Vqa, source: SampleSource) -> AnswerVocabulary:
    """The `task.answers` most frequent answers of a data set, the first in the alphabet on a tie; all there are, where they are fewer.

    Every answer of every person counts. Reads the whole data set. Raises DataError where it has no answers.
    """
    spelled: dict[str, Counter[str]] = defaultdict(Counter)
    for index in progress(range(len(source)), "reading the answers"):
        try:
            sample = source[index]
        except DamagedSample:  # counted where it is learnt from
            continue
        for answer in (clean(answer) for question in sample.questions for answer in question.answers):
            spelled[normalize(answer)][answer] += 1
    if not spelled:
        raise DataError(f"the {len(source)} training pictures have no answers to choose among: give VQA data with annotations, or leave out vqa.answers")
    ranked = sorted(spelled, key=lambda answer: (-spelled[answer].total(), answer))[: task.answers]
    return AnswerVocabulary(task, tuple(min(spelled[answer].items(), key=lambda pair: (-pair[1], pair[0]))[0] for answer in ranked))
