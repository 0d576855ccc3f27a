"""Visual question answering, scored with the official VQA accuracy, or as a benchmark has it."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal, cast

from adalink.errors import ConfigError, DataError
from multimodal.progress import progress
from multimodal.sample import DamagedSample, Question, Sample, SampleSource
from multimodal.template import Template, Text
from tasks.data.reader import Official
from tasks.data.sources import scorer_of
from tasks.metrics.bootstrap import answer_metrics
from tasks.metrics.files import vqa_results_name, write_vqa_results
from tasks.metrics.vqa import (
    HEADLINES,
    VQA_SCORERS,
    AnswerScores,
    GradedQuestion,
    VqaScorer,
    clean,
    few_answers_note,
    fitting_scorer,
    has_few_answers,
    normalize,
    score_answers,
)
from tasks.task import Asked, Score

__all__ = ["AnswerVocabulary", "Vqa", "answer_vocabulary", "graded_question", "training_questions", "most_common"]


# What a model that sees already is asked, inside its own chat template.
WORDS = Template(prompt="<image>{question}\nAnswer the question using a single word or phrase.", target="{text}")

AS_WRITTEN = Template(prompt="<image>{question}", target="{text}")  # turns of conversations hold all their words


@dataclass(frozen=True, kw_only=True)
class Vqa:
    """VQA, the answer written or chosen, with the official accuracy."""

    name: ClassVar[str] = "vqa"
    headline: ClassVar[str] = "accuracy"

    template: Template = Template(prompt="<image><bos>question: {question} answer:", target=" {text}<eos>")  # words around question and answer
    learn: Literal["common", "drawn"] = "common"  # of ten answers: the most common one, or one drawn anew each epoch
    questions_per_image: int = 0  # how many of an image's questions each step learns; 0: all of them
    answers: int = 0  # a trained head chooses among so many most frequent answers of the training data (3129 for VQAv2); 0: the answer is written
    scorer: VqaScorer | None = (
        None  # see `adalink score vqa --help`; by default the benchmark's own, else official (or the exact match, where most have too few answers)
    )

    def __post_init__(self) -> None:
        """Check what a config file can get wrong."""
        if self.questions_per_image < 0:
            raise ConfigError(f"questions_per_image is {self.questions_per_image}: give 0 (all) or more")
        if self.answers < 0 or self.answers == 1:
            raise ConfigError(f"vqa.answers is {self.answers}: give 0 (the answer is written), or 2 or more to choose among")
        if self.learn not in ("common", "drawn"):
            raise ConfigError(f"of ten answers, {self.learn!r} cannot be trained on: give common or drawn")
        if self.answers and self.learn == "drawn":
            raise ConfigError(f"learn is drawn, and a head of {self.answers} answers learns the scores of all ten: leave one of learn and answers out")
        if self.scorer not in (None, *VQA_SCORERS):
            raise ConfigError(f"there is no scorer {self.scorer!r}: give one of {', '.join(VQA_SCORERS)}")

    def words_for(self, sees_already: bool, as_written: bool = False) -> Template:
        """The template; where it is the one by default, for a model that sees already the question with a request, or alone where it is a turn's."""
        if not sees_already or self.template != Vqa().template:
            return self.template
        return AS_WRITTEN if as_written else WORDS

    @property
    def results_name(self) -> Callable[[str, str], str]:
        """Such as v2_OpenEnded_mscoco_val2014_adalink_results.json."""
        return vqa_results_name

    def texts(self, sample: Sample, rng: random.Random) -> Sequence[Text]:
        """Each answered question with one of its answers."""
        questions = training_questions(self, sample, rng)
        answers = [most_common(question) if self.learn == "common" else rng.choice(question.answers) for question in questions]
        return [Text(one.text, answer, turns=one.turns, places=one.places, task=one.question_type) for one, answer in zip(questions, answers, strict=True)]

    def asked(self, sample: Sample) -> Sequence[Asked]:
        """Every question of the image, after the turns before it."""
        return [Asked(question.question_id, question.text, question.turns, question.places) for question in sample.questions]

    def is_graded(self, sample: Sample) -> bool:
        """Whether one of its questions has answers."""
        return any(question.answers for question in sample.questions)

    def score(self, predictions: Mapping[int, str], source: SampleSource) -> Score:
        """Accuracy (or what the scorer gives) in percent, overall and per answer type, over the questions with answers that were predicted.

        The exact match stands before it where most of these questions have too few answers for the official accuracy.

        Raises DataError where none was, or they have no answers.
        """
        asked = (question for i in range(len(source)) for question in source[i].questions if question.question_id in predictions)
        questions = [question for question in asked if question.answers]
        if not questions and not any(source[i].questions for i in range(len(source))):
            raise DataError("the data set has no question, and the task vqa needs them: give data with questions and answers, or another task")
        if not questions:
            raise DataError("these questions cannot be scored: none was predicted, or the data set has no answers (a test split?)")
        graded = [graded_question(question) for question in questions]
        chosen = cast("VqaScorer", self.scorer or scorer_of(source) or "official")
        fitting = fitting_scorer(chosen, graded)
        scores = score_answers(dict(predictions), graded, fitting)
        headline = HEADLINES.get(fitting, self.headline)
        metrics, other = _named(headline, scores), {}
        if fitting != chosen:
            official = score_answers(dict(predictions), graded, chosen)
            other = dict.fromkeys(_named(self.headline, official), official.scorer)
            metrics |= _named(self.headline, official)
        named = {headline: "overall", **{f"{headline} ({kind})": f"answer type: {kind or '(none)'}" for kind in scores.per_answer_type}}
        return Score(
            metrics=metrics,
            headline=headline,
            items={int(item): value for item, value in scores.per_question.items()},
            scorer=scores.scorer,
            other_scorers=other,
            resampled=answer_metrics(scores, graded).chosen(named),
            note="; ".join(few_answers_note(chosen, graded)),
        )

    def write_results(self, path: Path, predictions: Mapping[int, str], official: Official | None = None) -> None:
        """The VQA challenge's result file."""
        write_vqa_results(path, predictions, official)


def _named(name: str, scores: AnswerScores) -> dict[str, float]:
    by_type = scores.per_answer_type if set(scores.per_answer_type) != {""} else {}
    return {name: scores.overall, **{f"{name} ({kind})": value for kind, value in by_type.items()}}


def training_questions(task: Vqa, sample: Sample, rng: random.Random) -> list[Question]:
    """The answered questions that a step learns, or as many as were asked for."""
    answered = [question for question in sample.questions if question.answers]
    if task.questions_per_image and len(answered) > task.questions_per_image:
        answered = rng.sample(answered, task.questions_per_image)
    return answered


def most_common(question: Question) -> str:
    """The answer that most people gave; the first of them on a tie."""
    return Counter(question.answers).most_common(1)[0][0]


def graded_question(question: Question) -> GradedQuestion:
    """A question as the scorers take it."""
    return GradedQuestion(
        question_id=question.question_id,
        answers=question.answers,
        question_type=question.question_type,
        answer_type=question.answer_type,
        marks=question.marks,
    )


# ----------------------------------------
# The answers that a model may choose among: the most frequent ones of the training annotations, and what each would score.


@dataclass(frozen=True)
class AnswerVocabulary:
    """Answers that are different once normalised as the official evaluation does it, each spelled as people spell it most often.

    They are what the head of a model chooses among, in this order; `texts` is what such a model learns of a sample.
    """

    task: Vqa
    answers: tuple[str, ...]
    n_unlisted: int = 0  # questions of which no answer is in the list
    n_questions: int = 0  # with answers

    def texts(self, sample: Sample, rng: random.Random) -> Sequence[Text]:
        """The questions that the task takes, each with the scores of the answers that people gave."""
        questions = training_questions(self.task, sample, rng)
        return [Text(one.text, most_common(one), self.scores(one), turns=one.turns, places=one.places, task=one.question_type) for one in questions]

    def scores(self, question: Question) -> tuple[tuple[int, float], ...]:
        """(number of an answer, its VQA accuracy from above 0 to 1) for the answers that people gave, the most common first.

        Answers that are not in the list are no target.

        Four of ten people or more: 1; three: 0.9; two: 0.6; one: 0.3. Each answer to a question that has too few for that: 1.
        """
        graded = graded_question(question)
        scorer: VqaScorer = "exact" if has_few_answers(graded) else "normalized"
        given = [answer for answer, _ in Counter(normalize(clean(answer)) for answer in question.answers).most_common()]
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
    questions: Counter[frozenset[str]] = Counter()
    for index in progress(range(len(source)), "reading the answers"):
        try:
            sample = source[index]
        except DamagedSample:  # counted where it is trained on
            continue
        for given in ([clean(answer) for answer in question.answers] for question in sample.questions if question.answers):
            questions[frozenset(map(normalize, given))] += 1
            for answer in given:
                spelled[normalize(answer)][answer] += 1
    if not spelled:
        raise DataError(f"the {len(source)} training images have no answers to choose among: give VQA data with annotations, or leave out vqa.answers")
    ranked = sorted(spelled, key=lambda answer: (-spelled[answer].total(), answer))[: task.answers]
    n_unlisted = sum(n for given, n in questions.items() if given.isdisjoint(ranked))
    names = tuple(min(spelled[answer].items(), key=lambda pair: (-pair[1], pair[0]))[0] for answer in ranked)
    return AnswerVocabulary(task, names, n_unlisted, questions.total())
