from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import plain_vqa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shared import fixtures

from adalink.errors import ConfigError, DataError
from tasks.metrics.vqa import GradedQuestion, clean, few_answers_note, fitting_scorer, has_few_answers, normalize, score_answers


def question(answers: list[str], **fields: Any) -> GradedQuestion:
    return GradedQuestion(**({"question_id": 1, "answers": tuple(answers)} | fields))


def accuracy(prediction: str, answers: list[str], scorer: Any = "official") -> float:
    return score_answers({1: prediction}, [question(answers)], scorer).overall


def graded(case: dict[str, Any]) -> GradedQuestion:
    marks = tuple(case["answer_confidences"]) if case.get("answers_have_no_answer_id") else ()
    return GradedQuestion(
        question_id=case["question_id"],
        answers=tuple(case["answers"]),
        question_type=case["question_type"],
        answer_type=case["answer_type"],
        marks=marks,
    )


@pytest.mark.parametrize("path", sorted(fixtures("vqa").glob("vqa_cases_*.json")), ids=lambda path: path.stem)
def test_every_recorded_case_and_aggregate_equals_the_official_evaluator(path: Path) -> None:
    document = json.loads(path.read_text())
    scores = score_answers({case["question_id"]: case["prediction"] for case in document["cases"]}, [graded(case) for case in document["cases"]])
    for digits in (2, 12):
        wrong = [
            (case["question_id"], scores.per_question[case["question_id"]], case[f"official_acc_pct_n{digits}"])
            for case in document["cases"]
            if round(scores.per_question[case["question_id"]], digits) != case[f"official_acc_pct_n{digits}"]
        ]
        assert wrong == []
        official = document["aggregates"][f"n{digits}"]
        assert round(scores.overall, digits) == official["overall"]
        assert {name: round(value, digits) for name, value in scores.per_question_type.items()} == official["perQuestionType"]
        assert {name: round(value, digits) for name, value in scores.per_answer_type.items()} == official["perAnswerType"]


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("The two dogs!", "2 dogs"),
        ("none", "0"),
        ("Dont", "don't"),
        ("an apple, a day", "apple day"),
        ("black/white", "black white"),  # no space beside the mark: it becomes one
        ("black /white", "black white"),
        ("1,000 (ten)", "1000 10"),  # a comma between digits: all marks go
        ("5.", "5"),
        ("5.5", "5.5"),
        ("a.b", "ab"),
        ("." * 40, "." * 8),  # the official count of 32
        ("somebody'd", "somebodyd"),
        ("y'alld've", "y'all'd've"),
        ("im", "im"),
        ("it\u2019s", "it\u2019s"),
    ],
)
def test_normalisation_has_the_official_quirks(answer: str, normal: str) -> None:
    assert normalize(answer) == normal


def test_cleaning_puts_an_answer_on_one_line() -> None:
    assert clean("\ta\nb ") == "a b"


def test_three_other_people_make_an_answer_right() -> None:
    assert accuracy("a dog", ["dog"] * 4 + ["cat"] * 6) == pytest.approx(100)
    assert accuracy("dog", ["dog"] * 3 + ["cat"] * 7) == pytest.approx(90)
    assert accuracy("dog", ["dog"] + ["cat"] * 9) == pytest.approx(30)
    assert accuracy("bird", ["dog"] + ["cat"] * 9) == 0


def test_only_the_normalized_scorer_mends_what_all_people_agree_on() -> None:
    assert accuracy("Yes!", ["yes"] * 10) == 0
    assert accuracy("Yes!", ["yes"] * 10, "normalized") == 100
    assert accuracy("Yes!", ["yes"] * 9 + ["no"]) == 100


def test_equal_records_without_an_id_drop_out_together() -> None:
    answers = ["dog"] * 4 + ["cat"] * 6
    marked = question(answers, marks=("yes",) * 10)
    # Each "dog" leaves no other "dog" record; each "cat" leaves all four.
    assert score_answers({1: "dog"}, [marked]).overall == pytest.approx(60)
    assert score_answers({1: "dog"}, [question(answers)]).overall == pytest.approx(100)


def test_one_answer_is_matched_exactly_after_the_official_normalisation() -> None:
    assert accuracy("The Dog!", ["dog"]) == 0  # nobody else is left to agree
    assert accuracy("The Dog!", ["dog"], "exact") == 100
    assert accuracy("two dogs", ["cat", "2 dogs"], "exact") == 100
    assert accuracy("dogs", ["cat", "2 dogs"], "exact") == 0
    assert score_answers({1: "x"}, [question(["x"])], "exact").scorer.startswith("exact match with one of the answers")


@pytest.mark.parametrize(
    ("answers", "marks", "is_few"),
    [
        (["yes"], (), True),
        (["yes"] * 3, (), True),
        (["yes"] * 4, (), False),
        (["a", "b", "c", "d"], (), False),
        (["yes"] * 10, ("{}",) * 10, True),  # equal records count as one, so all ten are left out together
        (["yes"] * 9 + ["no"], ("{}",) * 10, True),
        (["yes"] * 10, ("sure",) * 10, True),
        (["yes"] * 9 + ["no"], ("sure",) * 10, False),
        (["yes"] * 10, ("sure",) * 9 + ("{}",), False),
    ],
)
def test_questions_with_too_few_answers_are_recognised(answers: list[str], marks: tuple[str, ...], is_few: bool) -> None:
    assert has_few_answers(question(answers, marks=marks)) == is_few


def test_the_exact_match_fits_where_most_questions_have_too_few_answers() -> None:
    many, one = question(["x"] * 10, question_id=1), question(["x"], question_id=2)
    other = question(["y", "y"], question_id="3")
    assert fitting_scorer("official", [many]) == "official"
    assert few_answers_note("official", [many]) == []
    assert fitting_scorer("official", [many, one]) == "official"
    assert few_answers_note("official", [many, one])[0].endswith("1 of 2 questions (first: question 2, with 1), and --scorer exact gives the exact match")
    assert fitting_scorer("normalized", [many, one, other]) == "exact"
    assert few_answers_note("official", [many, one, other])[0].endswith(
        "2 of 3 questions (first: question 2, with 1), so the exact match after the official normalisation is given"
    )
    assert few_answers_note("exact", [one]) == []


def test_figures_name_their_scorer() -> None:
    assert "official (equal to GT-Vision-Lab/VQA a013f004)" in score_answers({1: "x"}, [question(["x"] * 10)]).scorer
    assert "normalized" in score_answers({1: "x"}, [question(["x"] * 10)], "normalized").scorer


def test_types_are_scored_apart() -> None:
    questions = [
        question(["x"] * 10, question_id=1, question_type="what", answer_type="other"),
        question(["y"] * 10, question_id=2, question_type="is", answer_type="yes/no"),
        question(["y"] * 10, question_id="3", question_type="is", answer_type="yes/no"),
    ]
    scores = score_answers({1: "x", 2: "y", "3": "n"}, questions)
    assert scores.per_question_type == {"what": 100, "is": 50}
    assert scores.per_answer_type == {"other": 100, "yes/no": 50}
    assert scores.per_question == {1: 100, 2: 100, "3": 0}


@pytest.mark.parametrize(
    ("predictions", "questions", "message"),
    [
        ({1: "a"}, [], "there are no questions"),
        ({1: "a"}, [question(["a"]), question(["a"])], r"1 question ids stand more than once \(first: 1\)"),
        ({1: "a"}, [question(["a"]), question(["a"], question_id=2)], r"1 questions have no predicted answer \(first: 2\)"),
        ({1: "a", 5: "b"}, [question(["a"])], r"1 predicted answers belong to no question \(first: 5\)"),
        ({1: "a"}, [question([])], "1 questions have no human answers"),
    ],
)
def test_predictions_that_do_not_fit_are_named(predictions: dict[int, str], questions: list[GradedQuestion], message: str) -> None:
    with pytest.raises(DataError, match=message):
        score_answers(predictions, questions)


def test_an_unknown_scorer_and_missing_marks_are_named() -> None:
    with pytest.raises(ConfigError, match="no VQA scorer 'best'; expected one of official, normalized, exact"):
        accuracy("a", ["a"], "best")
    with pytest.raises(ConfigError, match="question 1 has 1 marks for 2 answers"):
        question(["a", "b"], marks=("yes",))


@given(st.text(), st.lists(st.text(), min_size=1, max_size=10), st.randoms())
def test_the_order_of_answers_changes_no_figure_and_no_text_fails(prediction: str, answers: list[str], random: Any) -> None:
    shuffled = random.sample(answers, len(answers))
    for scorer in ("official", "normalized"):
        assert accuracy(prediction, answers, scorer) == pytest.approx(accuracy(prediction, shuffled, scorer), abs=1e-9)


@given(st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=20), st.randoms())
def test_the_order_of_questions_changes_no_figure(predictions: list[str], random: Any) -> None:
    questions = [question(["a"] * 4 + ["b"] * 6, question_id=i, answer_type="xy"[i % 2]) for i in range(len(predictions))]
    given_answers = dict(enumerate(predictions))
    first, second = score_answers(given_answers, questions), score_answers(given_answers, random.sample(questions, len(questions)))
    assert first.overall == pytest.approx(second.overall, abs=1e-9)
    assert first.per_answer_type == pytest.approx(second.per_answer_type, abs=1e-9)


WORDS = st.sampled_from("a The two ten none Dont cant ow'sat o'clock im 1,000 5. .5 a.b yes/no one-two dog! it's \u2019 \u0661".split())
TEXTS = st.lists(WORDS, max_size=4).map(" ".join) | st.text("abT12.,;/[]\"{}()=+\\_-><@`?!' \n\t\u0130\u00b2\u00a0", max_size=9) | st.text(max_size=9)


@given(TEXTS, st.lists(TEXTS, min_size=1, max_size=3), st.data())
@settings(max_examples=400, deadline=None)
def test_the_fast_scorer_equals_the_published_rules_written_plainly(other: str, stated: list[str], data: Any) -> None:
    answers = data.draw(st.lists(st.sampled_from(stated), min_size=1, max_size=10))
    prediction = data.draw(st.sampled_from([*stated, other]))
    plain = plain_vqa.accuracy(prediction, [{"answer": text, "answer_id": i} for i, text in enumerate(answers)])
    assert accuracy(prediction, answers) == pytest.approx(100 * plain, abs=1e-9)
    bare = plain_vqa.accuracy(prediction, [{"answer": text, "answer_confidence": "yes"} for text in answers])
    marked = score_answers({1: prediction}, [question(answers, marks=("yes",) * len(answers))]).overall
    assert marked == pytest.approx(100 * bare, abs=1e-9)


@pytest.mark.parametrize("path", sorted(fixtures("vqa").glob("vqa_cases_*.json")), ids=lambda path: path.stem)
def test_the_plain_rules_that_speed_is_measured_against_give_the_official_figures(path: Path) -> None:
    for case in json.loads(path.read_text())["cases"][:500]:
        if not case.get("answers_have_no_answer_id"):
            records = [{"answer": text, "answer_id": i} for i, text in enumerate(case["answers"])]
            assert round(100 * plain_vqa.accuracy(case["prediction"], records), 12) == case["official_acc_pct_n12"]


@pytest.mark.parametrize(
    ("scorer", "prediction", "answers", "expected"),
    [
        ("anls", "FOSTER  Farms ", ["foster farms"], 100),  # neither case nor the number of spaces counts
        ("anls", "fosterfarms", ["foster farms"], 100 * (1 - 1 / 12)),  # a space does
        ("anls", "helo", ["world", "hello"], 80),  # one of five letters, of the nearer answer
        ("anls", "1/8/1993", ["1/8/93"], 75),
        ("anls", "ab", ["ac"], 50),  # the threshold itself counts
        ("anls", "axx", ["abc"], 0),  # a third is below it
        ("anls", "", ["yes"], 0),
        ("relaxed", "10.5", ["10"], 100),  # exactly 5 %
        ("relaxed", "10.6", ["10"], 0),
        ("relaxed", "-9.6", ["-10"], 100),
        ("relaxed", "9.6", ["-10"], 0),
        ("relaxed", "21%", ["0.2"], 100),
        ("relaxed", "0.01", ["0"], 0),  # of 0 nothing is 5 %
        ("relaxed", "0", ["0"], 100),
        ("relaxed", "yes", ["Yes"], 100),
        ("relaxed", "1,000", ["1000"], 0),  # no number
        ("choice", "B", ["B"], 100),
        ("choice", "b.", ["B"], 100),
        ("choice", "(B)", ["B"], 100),
        ("choice", "B. a dog", ["B"], 100),
        ("choice", "A", ["B"], 0),
        ("choice", "a dog", ["B"], 0),
        ("choice", "A", ["A"], 100),  # no article here
        ("choice", "", ["A"], 0),
        ("choice", "Because", ["B"], 0),
    ],
)
def test_scores_of_benchmarks_are_those_worked_out_by_hand(scorer: Any, prediction: str, answers: list[str], expected: float) -> None:
    assert accuracy(prediction, answers, scorer) == pytest.approx(expected)
    assert fitting_scorer(scorer, [question(answers)]) == scorer
    assert few_answers_note(scorer, [question(answers)]) == []


@settings(max_examples=50)
@given(st.text("ab ", max_size=8), st.text("ab ", max_size=8))
def test_anls_equals_the_plain_definition(one: str, other: str) -> None:
    def edits(a: str, b: str) -> int:
        if not a or not b:
            return len(a) + len(b)
        return min(edits(a[1:], b) + 1, edits(a, b[1:]) + 1, edits(a[1:], b[1:]) + (a[0] != b[0]))

    longest = max(len(one), len(other))
    similarity = 1 - edits(" ".join(one.split()), " ".join(other.split())) / longest if longest else 1
    assert accuracy(one, [other], "anls") == pytest.approx(100 * similarity if similarity >= 0.5 else 0)
