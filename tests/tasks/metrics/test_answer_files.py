from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from shared import fixtures, shared

from adalink.errors import DataError
from tasks.metrics.files import check_questions, read_answer_results, read_graded_questions, read_question_ids
from tasks.metrics.vqa import GradedQuestion, score_answers


def written(tmp_path: Path, document: object, name: str = "file.json") -> Path:
    path = tmp_path / name
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def people(answers: list[str], **fields: Any) -> list[dict[str, Any]]:
    return [{"answer": answer, **fields} for answer in answers]


def test_vqav2_and_ok_vqa_have_types_and_need_no_marks(tmp_path: Path) -> None:
    answers = [{"answer": answer, "raw_answer": "x", "answer_confidence": "yes", "answer_id": i} for i, answer in enumerate(["a", "a", "b"])]
    document = {"annotations": [{"question_id": 7, "image_id": 1, "question_type": "what", "answer_type": "other", "answers": answers}]}
    assert read_graded_questions(written(tmp_path, document)) == [
        GradedQuestion(question_id=7, answers=("a", "a", "b"), question_type="what", answer_type="other")
    ]


def test_answers_without_an_id_of_their_own_are_marked_by_the_rest_of_the_record(tmp_path: Path) -> None:
    answers = [*people(["a", "b"], answer_confidence="yes"), *people(["a"], answer_confidence="no")]
    (found,) = read_graded_questions(written(tmp_path, [{"image": "VizWiz_val_0.jpg", "answers": answers, "answer_type": "other"}]))
    assert (found.question_id, found.answers, found.answer_type) == ("VizWiz_val_0.jpg", ("a", "b", "a"), "other")
    assert found.marks[0] == found.marks[1] != found.marks[2]


def test_ids_that_repeat_are_part_of_the_mark(tmp_path: Path) -> None:
    document = {"annotations": [{"question_id": 7, "answers": people(["a", "a"], answer_id=1)}]}
    (found,) = read_graded_questions(written(tmp_path, document))
    assert found.marks == ('{"answer_id": 1}',) * 2


def test_textvqa_and_a_okvqa_hold_plain_texts(tmp_path: Path) -> None:
    textvqa = {"dataset_name": "textvqa", "data": [{"question_id": 34602, "image_id": "00ab", "answers": ["nokia"] * 9 + ["toshiba"]}]}
    assert read_graded_questions(written(tmp_path, textvqa)) == [GradedQuestion(question_id=34602, answers=("nokia",) * 9 + ("toshiba",))]
    a_okvqa = [{"question_id": "22Mex", "choices": ["a", "b"], "direct_answers": ["ramp", "ramps"]}]
    assert read_graded_questions(written(tmp_path, a_okvqa)) == [GradedQuestion(question_id="22Mex", answers=("ramp", "ramps"))]


def test_one_answer_stands_for_ten_people_so_that_only_the_same_string_is_right(tmp_path: Path) -> None:
    gqa = {"201": {"answer": "yes", "types": {"structural": "verify", "semantic": "rel"}}, "202": {"answer": "pipe", "types": {}}}
    found = read_graded_questions(written(tmp_path, gqa))
    assert found[0] == GradedQuestion(question_id="201", answers=("yes",) * 10, question_type="verify", answer_type="rel")
    assert score_answers({"201": "yes", "202": "the pipe"}, found).per_question == {"201": 100, "202": 0}
    assert score_answers({"201": "yes", "202": "the pipe"}, found, "normalized").per_question == {"201": 100, "202": 100}
    daquar = "what is on the desk in image3 ?\nbook\n\nhow many chairs ?\n2\n"
    assert [question.answers[0] for question in read_graded_questions(written(tmp_path, daquar, "qa.txt"))] == ["book", "2"]


def test_real_files_are_read() -> None:
    found = read_graded_questions(shared("data/daquar/annotations/daquar_val_annotations.json"))
    assert {len(question.answers) for question in found} == {10}
    ids = read_question_ids(shared("data/daquar/annotations/OpenEnded_daquar_val_questions.json"))
    check_questions(ids, [question.question_id for question in found], Path("a"), Path("b"))
    assert score_answers({question.question_id: question.answers[0] for question in found}, found).overall == 100


def test_the_official_files_score_as_the_recorded_cases() -> None:
    folder = fixtures("vqa")
    for results in sorted(folder.glob("official_format_*_results.json")):
        which = results.name.removeprefix("official_format_").removesuffix("_results.json")
        graded = read_graded_questions(folder / f"official_format_{which}_annotations.json")
        scores = score_answers(read_answer_results(results), graded)
        official = json.loads((folder / f"vqa_cases_{which}.json").read_text())["aggregates"]["n12"]
        assert round(scores.overall, 12) == official["overall"]
        assert {name: round(value, 12) for name, value in scores.per_question_type.items()} == official["perQuestionType"]
        assert {name: round(value, 12) for name, value in scores.per_answer_type.items()} == official["perAnswerType"]


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ([{"question_id": 1, "answer": "yes"}, {"question_id": "b", "answer": ""}], {1: "yes", "b": ""}),
        ([{"questionId": "201", "prediction": "no"}], {"201": "no"}),
        ([{"image": "VizWiz_val_0.jpg", "answer": "soup"}], {"VizWiz_val_0.jpg": "soup"}),
        ({"22Mex": {"multiple_choice": "a", "direct_answer": "ramp"}}, {"22Mex": "ramp"}),
    ],
)
def test_results_of_every_challenge_are_read(tmp_path: Path, document: object, expected: dict[Any, str]) -> None:
    assert read_answer_results(written(tmp_path, document)) == expected


ONE = {"question_id": 1, "answer": "a"}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("{", "is not JSON: .*is it whole, and unpacked"),
        ({"results": [ONE]}, r"'results' is .*expected an object with named fields"),
        (3, r"holds 3; expected a list of \{\"question_id\": 42, \"answer\": \"yes\"\}"),
        ([], "holds an empty list; expected at least one"),
        ([ONE, 5], r"file.json\[1\] is 5"),
        ([{"question_id": 1}], r"file.json\[0\] has no 'answer'"),
        ([{"question_id": 1, "answer": 5}], r"\[0\]: 'answer' is 5 \(int\); expected a text"),
        ([{"question_id": 1.5, "answer": "a"}], r"\[0\]: 'question_id' is 1.5 \(float\); expected a whole number"),
        ([{"answer": "a"}], r"\[0\] has no 'question_id'"),
        ([ONE, ONE, {"question_id": 2, "answer": "a"}], r"1 questions have more than one answer in .*\(first: 1\)"),
    ],
)
def test_results_of_another_shape_are_named(tmp_path: Path, document: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_answer_results(written(tmp_path, document))


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"questions": []}, "has none of the known formats of questions with answers; expected an object with the list 'annotations'"),
        ([], "has none of the known formats"),
        ({"annotations": [{"question_id": 1}]}, r"annotations\[0\] has no list 'answers'; expected people's answers there"),
        ({"annotations": [{"question_id": 1, "answers": ["a"]}]}, r"annotations\[0\].answers\[0\] is 'a'; expected an object"),
        ({"annotations": [{"question_id": 1, "answers": []}]}, r"1 questions of .* have no answers \(first: 1\); .*test split"),
        ({"annotations": [{"question_id": 1, "answers": people(["a"])}] * 2}, r"1 question ids stand more than once in .*\(first: 1\)"),
        ({"data": [{"question_id": 1, "answers": [None]}]}, r"data\[0\].answers\[0\] is 'None'; expected a text"),
        ([{"question_id": "x", "direct_answers": "ramp"}], "has no list 'direct_answers'"),
        ({"201": {"answer": "yes", "types": 5}}, "'201': 'types' is '5'; expected an object"),
    ],
)
def test_annotations_of_another_shape_are_named(tmp_path: Path, document: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_graded_questions(written(tmp_path, document))


def test_text_files_that_are_missing_or_uneven_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"qa.txt cannot be read: .*expected a text file of questions and answers in turn"):
        read_graded_questions(tmp_path / "qa.txt")
    with pytest.raises(DataError, match="has 3 lines that are not empty; expected a question and its answer in turn"):
        read_graded_questions(written(tmp_path, "a\nb\nc\n", "qa.txt"))


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none.json does not exist; check the path"):
        read_graded_questions(tmp_path / "none.json")
    with pytest.raises(DataError, match=r"cannot be read: .*expected a JSON file"):
        read_answer_results(tmp_path)


def test_repeated_questions_are_named(tmp_path: Path) -> None:
    rows = [{"question_id": 3, "question": "?"}] * 2
    with pytest.raises(DataError, match=r"1 question ids stand more than once in .*\(first: 3\)"):
        read_question_ids(written(tmp_path, {"questions": rows}))


def test_files_of_different_splits_are_named_with_counts() -> None:
    with pytest.raises(DataError, match=r"7 questions of r.json are not in a.json \(first: 0, 1, 2, 3, 4, ...\); 7 of 7 questions there are unknown, 2 of 2"):
        check_questions(range(7), [50, 51], Path("r.json"), Path("a.json"))
    with pytest.raises(DataError, match=r"1 questions of a.json are not in r.json \(first: 51\); .*are both files of one split"):
        check_questions([50], [50, 51], Path("r.json"), Path("a.json"))
