"""Scores of answers: the official VQA accuracy, the variant that always normalises, exact match, ANLS, relaxed accuracy, and choices by letter."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeAlias, cast

from adalink.errors import ConfigError, DataError

__all__ = [
    "HEADLINES", "VQA_SCORERS", "AnswerScores", "GradedQuestion", "Predictions", "QuestionId", "VqaScorer", "clean", "few_answers_note",
    "fitting_scorer", "has_few_answers", "named_accuracies", "names_of_types", "normalize", "refuse", "refuse_repeated", "score_answers",
]  # fmt: skip


# ----------------------------------------
# The answer normalisation of the official VQA evaluation, quirks included.
#
# Source of every table and every order of steps: GT-Vision-Lab/VQA at a013f004, PythonEvaluationTools/vqaEvaluation/vqaEval.py.


_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_ODD = re.compile(r"[;/\[\]\"{}()=+\\_\-><@`,?!.]")
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
# The official pattern means to spare the dot after a digit too, but its look-behind is misspelt, so only the dot BEFORE one is spared.
_DOT = re.compile(r"\.(?!\d)")
# The official code passes re.UNICODE where `sub` takes the count, and the flag's value is 32: later dots stay.
_MOST_DOTS = int(re.UNICODE)

_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0"} | {word: str(value) for value, word in enumerate(_DIGITS)}
_ARTICLES = frozenset({"a", "an", "the"})

# Written without one of their apostrophes, these get it back. Words that the official table holds with a capital I never match,
# because it is looked up in lower case; hence no "i'm" here.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd how'll
    how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't
    she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's
    something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas
    wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've
    why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _without_one_apostrophe(word: str) -> list[str]:
    return [word[:at] + word[at + 1 :] for at, letter in enumerate(word) if letter == "'"]


_MENDED = {broken: word for word in _CONTRACTIONS.split() for broken in _without_one_apostrophe(word)}
_MENDED["somebody'd"] = "somebodyd"  # the official table has this pair the wrong way round


def clean(answer: str) -> str:
    """The answer on one line: the only thing done to it where all human answers are equal."""
    return answer.replace("\n", " ").replace("\t", " ").strip()


@lru_cache(maxsize=1 << 18)  # answers repeat: VQAv2 val has 2.1 million human answers and 100 thousand different ones
def normalize(answer: str) -> str:
    """The cleaned answer without punctuation and articles, numbers as digits: "The two dogs!" -> "2 dogs"."""
    words = [_NUMBERS.get(word, word) for word in _strip_punctuation(answer).lower().split()]
    return " ".join([_MENDED.get(word, word) for word in words if word not in _ARTICLES])


def _strip_punctuation(answer: str) -> str:
    """A mark that touches a space somewhere is deleted everywhere, any other becomes a space; after "1,000" all marks are deleted."""
    if not _ODD.search(answer):
        return answer
    delete_all = _DIGIT_COMMA_DIGIT.search(answer) is not None
    table = {
        ord(mark): None if delete_all or f"{mark} " in answer or f" {mark}" in answer else " " for mark in _PUNCTUATION if mark in answer
    }
    return _DOT.sub("", answer.translate(table), count=_MOST_DOTS)


# ----------------------------------------
# Errors that name the first few items at fault and count all of them.


_DISPLAYED = 5


def refuse(items: Collection[Hashable], what: str, expected: str) -> None:
    """Raises DataError where there are items at fault: "3 images have no caption (first: 7, 9, 12); expected ...".

    what      follows the count, such as "images have no caption"
    expected  what was expected, or what to do
    """
    if items:
        first = ", ".join(repr(name) for name in list(items)[:_DISPLAYED])
        raise DataError(f"{len(items)} {what} (first: {first}{', ...' if len(items) > _DISPLAYED else ''}); {expected}")


def refuse_repeated(names: Iterable[Hashable], what: str) -> None:
    """Raises DataError where a name stands more than once; what follows the count, such as "image ids stand more than once in x.json"."""
    refuse([name for name, count in Counter(names).items() if count > 1], what, "expected each once")


VqaScorer: TypeAlias = Literal["official", "normalized", "exact", "anls", "relaxed", "choice"]
QuestionId: TypeAlias = int | str  # numbers everywhere but in A-OKVQA (strings) and VizWiz (file names)
Predictions: TypeAlias = Mapping[int, str] | Mapping[str, str] | Mapping[QuestionId, str]

# Named beside every metric: what it equals, and the version it was checked against.
VQA_SCORERS: dict[VqaScorer, str] = {
    "official": "VQA accuracy, official (equal to GT-Vision-Lab/VQA a013f004)",
    "normalized": "VQA accuracy, normalized (GT-Vision-Lab/VQA a013f004, but every answer is normalised)",
    "exact": "exact match with one of the answers, all normalised as GT-Vision-Lab/VQA a013f004 does",
    "anls": "ANLS, threshold 0.5 (as the evaluation script of DocVQA and InfographicVQA computes it)",
    "relaxed": "relaxed accuracy, numbers within 5 % (Masry et al., ChartQA, 2022; as pix2struct's metrics.py computes it)",
    "choice": "accuracy of the letter of a choice",
}
HEADLINES: Mapping[VqaScorer, str] = {"exact": "exact match", "anls": "ANLS", "relaxed": "relaxed accuracy"}  # others: accuracy
_COUNTS_PEOPLE: frozenset[VqaScorer] = frozenset(("official", "normalized"))
_NO_MARK = "{}"  # of a record that has nothing beside the answer
_FULL = 4  # equal answers: each then has three others that agree, which is what makes it fully right


@dataclass(frozen=True, kw_only=True)
class GradedQuestion:
    """What people answered to one question, raw.

    answers  in the order of the file: the sum of their accuracies is rounded in that order
    marks    one per answer, or empty. The official script compares whole records, so two records equal in answer AND in everything
             else drop out together when one of them is left out. Records with an answer_id are never equal: marks stay empty.
             Without one (VizWiz), the mark is the rest of the record, such as the confidence "yes".
    """

    question_id: QuestionId
    answers: tuple[str, ...]
    question_type: str = ""
    answer_type: str = ""
    marks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.marks and len(self.marks) != len(self.answers):
            found = f"{len(self.marks)} marks for {len(self.answers)} answers"
            raise ConfigError(f"question {self.question_id} has {found}; expected one mark per answer, or none")


@dataclass(frozen=True, kw_only=True)
class AnswerScores:
    """Accuracies in percent, unrounded: the official script prints them with round(metric, 2)."""

    overall: float
    per_question_type: dict[str, float]
    per_answer_type: dict[str, float]
    per_question: dict[QuestionId, float]
    scorer: str


def named_accuracies(scores: AnswerScores) -> dict[str, float]:
    """Every corpus metric by a name that says what it is of: "overall", "answer type: number", "question type: what is the".

    A data set whose questions have no types has the overall metric alone.
    """
    metrics = {"overall": scores.overall}
    for kind, by_type in (("answer type", scores.per_answer_type), ("question type", scores.per_question_type)):
        if set(by_type) != {""}:
            metrics |= {f"{kind}: {name or '(none)'}": value for name, value in by_type.items()}
    return metrics


def names_of_types(question: GradedQuestion) -> tuple[str, str]:
    """The metrics of `named_accuracies` that a question is of, beside "overall"; of a data set without types there are no such metrics."""
    return f"answer type: {question.answer_type or '(none)'}", f"question type: {question.question_type or '(none)'}"


def has_few_answers(question: GradedQuestion) -> bool:
    """Whether the people who answered are too few for the official accuracy: an answer that all of them gave does not score 1.

    It compares with the answers of the other people, three of whom must agree: one answer has no others (0 for every prediction), two or three
    have too few. Records that are equal in all count as one: those with nothing beside the answer, and those of one mark and one answer.
    """
    if len(question.answers) < _FULL:
        return True
    is_one = len({normalize(clean(answer)) for answer in question.answers}) == 1
    return len(set(question.marks)) == 1 and (question.marks[0] == _NO_MARK or is_one)


def fitting_scorer(scorer: VqaScorer, questions: Sequence[GradedQuestion]) -> VqaScorer:
    """The scorer itself; `exact` where it counts how many people agree, and most of the questions have too few answers for that."""
    return "exact" if scorer in _COUNTS_PEOPLE and 2 * sum(map(has_few_answers, questions)) > len(questions) else scorer


def few_answers_note(scorer: VqaScorer, questions: Sequence[GradedQuestion]) -> list[str]:
    """A sentence where questions have too few answers for the official accuracy, and about what is done then."""
    few = [question for question in questions if has_few_answers(question)] if scorer in _COUNTS_PEOPLE else []
    if not few:
        return []
    is_exact = fitting_scorer(scorer, questions) == "exact"
    done = "so the exact match after the official normalisation is given" if is_exact else "and --scorer exact gives the exact match"
    return [
        f"too few answers for the official accuracy, which counts how many of the other people agree: {len(few)} of {len(questions)} questions "
        f"(first: question {few[0].question_id}, with {len(few[0].answers)}), {done}"
    ]


def score_answers(predictions: Predictions, questions: Sequence[GradedQuestion], scorer: VqaScorer = "official") -> AnswerScores:
    """The score of one predicted answer per question, in percent.

    official    normalises both sides only where the human answers differ, as the official script does; with all equal it wants the
                very same string
    normalized  normalises both sides always
    exact       100 where the prediction equals one of the answers, both normalised, else 0; for data with one answer to each question
    anls        100 - the percent of letters to be changed to reach the nearest answer, 0 below 50; in lower case, spaces as one
    relaxed     100 where the number is within 5 % of the answer, or the text the same in lower case, else 0
    choice      100 where the letter is the answer's: of "B", "b", "(B)", "B." and "B. a dog" it is B

    Raises DataError where questions have no prediction, predictions no question, or a question no answers.
    """
    given = cast("Mapping[QuestionId, str]", predictions)
    _check(given, questions, scorer)
    fractions: list[float] = []
    by_question_type: dict[str, list[float]] = {}
    by_answer_type: dict[str, list[float]] = {}
    for question in questions:
        fraction = _accuracy(given[question.question_id], question, scorer)
        fractions.append(fraction)
        by_question_type.setdefault(question.question_type, []).append(fraction)
        by_answer_type.setdefault(question.answer_type, []).append(fraction)
    return AnswerScores(
        overall=_percent(fractions),
        per_question_type={name: _percent(values) for name, values in by_question_type.items()},
        per_answer_type={name: _percent(values) for name, values in by_answer_type.items()},
        per_question={question.question_id: 100 * value for question, value in zip(questions, fractions, strict=True)},
        scorer=VQA_SCORERS[scorer],
    )


def _percent(fractions: Sequence[float]) -> float:
    return 100 * sum(fractions) / len(fractions)


def _accuracy(prediction: str, question: GradedQuestion, scorer: VqaScorer) -> float:
    """The mean over human answers of min(1, how many of the OTHER answers equal the prediction / 3); by other scorers the best of the answers."""
    if scorer in _ONE_ANSWER:
        return max(_ONE_ANSWER[scorer](prediction, answer) for answer in question.answers)
    answers = [clean(answer) for answer in question.answers]
    prediction = clean(prediction)
    if scorer == "exact":
        return float(normalize(prediction) in map(normalize, answers))
    if scorer == "normalized" or len(set(answers)) > 1:
        answers = [normalize(answer) for answer in answers]
        prediction = normalize(prediction)
    equal = answers.count(prediction)
    if not equal:
        return 0.0
    inside, unknown = min(1, (equal - 1) / 3), min(1, equal / 3)
    if question.marks:
        same = [mark for mark, answer in zip(question.marks, answers, strict=True) if answer == prediction]
        marked = {mark: min(1, (equal - same.count(mark)) / 3) for mark in same}
        each = [marked[mark] if answer == prediction else unknown for mark, answer in zip(question.marks, answers, strict=True)]
    else:
        each = [inside if answer == prediction else unknown for answer in answers]
    return float(sum(each)) / len(each)


# ----------------------------------------
# Scores of a prediction against one answer, each from 0 to 1.


_THRESHOLD = 0.5  # ANLS below it are 0
_LARGEST_CHANGE = 0.05  # of a number, relative to the answer
_LETTER = re.compile(r"\(?([a-zA-Z])(?:[).:](?:\s.*)?)?", re.DOTALL)


def _anls(prediction: str, answer: str) -> float:
    """1 - edit distance / length of the longer, 0 below the threshold; 0.5 itself counts, as in the official script.

    The script changes case and spaces before it counts edits, and takes the length without that.
    """
    one, other = (" ".join(text.strip().lower().split()) for text in (answer, prediction))
    longer = max(len(answer.upper()), len(prediction.upper()))
    similarity = 1 - _edits(one, other) / longer if longer else 1.0
    return similarity if similarity >= _THRESHOLD else 0.0


def _edits(one: str, other: str) -> int:
    """How many letters are to be added, left out or replaced (Levenshtein)."""
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, start=1):
        before, row[0] = row[0], i
        for j, wanted in enumerate(other, start=1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (letter != wanted))
    return row[-1]


def _relaxed(prediction: str, answer: str) -> float:
    """Whether the prediction is the answer; as numbers, `20%` being 0.2, where both are some and the answer is not 0."""
    found, wanted = _number(prediction), _number(answer)
    if found is not None and wanted:
        return float(abs(found - wanted) / abs(wanted) <= _LARGEST_CHANGE)
    return float(prediction.lower() == answer.lower())


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def _choice(prediction: str, answer: str) -> float:
    found = _LETTER.fullmatch(prediction.strip())
    return float(found is not None and found[1].upper() == answer.upper())


_ONE_ANSWER: Mapping[VqaScorer, Callable[[str, str], float]] = {"anls": _anls, "relaxed": _relaxed, "choice": _choice}


def _check(predictions: Mapping[QuestionId, str], questions: Sequence[GradedQuestion], scorer: VqaScorer) -> None:
    if scorer not in VQA_SCORERS:
        raise ConfigError(f"there is no VQA scorer {scorer!r}; expected one of {', '.join(VQA_SCORERS)}")
    if not questions:
        raise DataError("there are no questions to score; expected at least one")
    known = {question.question_id: None for question in questions}
    refuse_repeated((question.question_id for question in questions), "question ids stand more than once")
    refuse([name for name in known if name not in predictions], "questions have no predicted answer", "expected one for every question")
    refuse([name for name in predictions if name not in known], "predicted answers belong to no question", "expected those of these questions alone")
    bare = [question.question_id for question in questions if not question.answers]
    refuse(bare, "questions have no human answers to score against", "is it a test split?")
