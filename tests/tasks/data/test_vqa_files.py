from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from shared import shared

from adalink.errors import ConfigError, DataError
from multimodal.sample import Question
from tasks.data.vqa import read_vqa

QUESTIONS: dict[str, Any] = {
    "questions": [
        {"question_id": 70, "image_id": 7, "question": "Is it a dog? "},
        {"question_id": 30, "image_id": 3, "question": "How many?"},
        {"question_id": 71, "image_id": 7, "question": "What is it?"},
    ]
}
ANNOTATIONS: dict[str, Any] = {
    "annotations": [
        {"question_id": 30, "image_id": 3, "answers": [{"answer": "2", "answer_id": 1}, {"answer": " two\n", "answer_id": 2}], "answer_type": "number"},
        {"question_id": 71, "image_id": 7, "answers": [{"answer": "dog", "answer_id": 1}], "question_type": "what is", "answer_type": "other"},
        {"question_id": 70, "image_id": 7, "answers": [{"answer": "yes", "answer_id": i} for i in range(10)], "question_type": "is it", "answer_type": "yes/no"},
    ]
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for image_id in (3, 7):
        (tmp_path / "images" / f"image{image_id}.jpg").touch()
    return tmp_path


def arguments(root: Path, questions: object = QUESTIONS, annotations: object = ANNOTATIONS) -> dict[str, Any]:
    (root / "questions.json").write_text(json.dumps(questions))
    (root / "annotations.json").write_text(json.dumps(annotations))
    return {
        "images": root / "images",
        "questions": root / "questions.json",
        "annotations": root / "annotations.json",
        "image_name": "image{image_id}.jpg",
    }


def changed(document: dict[str, Any], index: int, **fields: object) -> dict[str, Any]:
    """A copy in which one row has other fields; a field set to None goes away."""
    found = copy.deepcopy(document)
    (rows,) = (rows for rows in found.values() if isinstance(rows, list))
    rows[index] = {key: value for key, value in (rows[index] | fields).items() if value is not None}
    return found


def test_one_sample_per_image_has_all_its_questions_with_their_own_answers(root: Path) -> None:
    source = read_vqa(**arguments(root))
    assert [source[i].key for i in range(len(source))] == ["7", "3"]
    assert source[0].image == root / "images" / "image7.jpg"
    assert source[0].questions == (
        Question(question_id=70, text="Is it a dog?", answers=("yes",) * 10, question_type="is it", answer_type="yes/no"),
        Question(question_id=71, text="What is it?", answers=("dog",), question_type="what is", answer_type="other"),
    )
    assert source.problems == ()


def test_answers_without_an_id_keep_what_tells_them_apart(root: Path) -> None:
    people = [{"answer": "yes", "answer_confidence": "yes"}, {"answer": "yes", "answer_confidence": "no"}]
    source = read_vqa(**arguments(root, annotations=changed(ANNOTATIONS, 1, answers=people)))
    assert source[0].questions[1].marks == ('{"answer_confidence": "yes"}', '{"answer_confidence": "no"}')
    assert source[0].questions[0].marks == ()


def test_answers_stay_as_they_stand_in_the_file(root: Path) -> None:
    assert read_vqa(**arguments(root))[1].questions[0].answers == ("2", " two\n")


def test_a_test_split_has_questions_without_answers(root: Path) -> None:
    source = read_vqa(**arguments(root) | {"annotations": None})
    assert source[1].questions == (Question(question_id=30, text="How many?"),)


def test_official_files_need_no_pattern_and_test_dev_shares_the_pictures_of_test(root: Path) -> None:
    for split, folder in (("val2014", "val2014"), ("test-dev2015", "test2015")):
        for image_id in (3, 7):
            (root / "images" / f"COCO_{folder}_{image_id:012d}.jpg").touch()
        source = read_vqa(**arguments(root, QUESTIONS | {"data_type": "mscoco", "data_subtype": split}) | {"image_name": None})
        assert source[0].image == root / "images" / f"COCO_{folder}_000000000007.jpg"


def test_other_files_need_a_pattern_and_say_so(root: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"questions.json does not say what its images are called; give an image name, such as image\{image_id\}.jpg"
    ):
        read_vqa(**arguments(root) | {"image_name": None})


def test_absent_pictures_and_empty_questions_are_counted_and_the_rest_stays(root: Path) -> None:
    questions = changed(QUESTIONS, 0, question=" ")
    questions["questions"] += [{"question_id": 90, "image_id": 9, "question": "Where?"}]
    annotations = {"annotations": [*ANNOTATIONS["annotations"], {"question_id": 90, "image_id": 9, "answers": [{"answer": "here"}]}]}
    (root / "images" / "image3.jpg").unlink()
    source = read_vqa(**arguments(root, questions, annotations))
    assert [question.question_id for question in source[0].questions] == [71]
    assert [(bad.key, bad.reason, bad.detail) for bad in source.problems] == [
        ("7", "empty question", "question 70 of image 7 is empty"),
        ("3", "missing file", f"{root / 'images' / 'image3.jpg'} is missing (1 question)"),
        ("9", "missing file", f"{root / 'images' / 'image9.jpg'} is missing (1 question)"),
    ]


def test_an_image_whose_questions_are_all_empty_is_counted(root: Path) -> None:
    source = read_vqa(**arguments(root, changed(QUESTIONS, 1, question="")))
    assert [(bad.key, bad.reason) for bad in source.problems] == [("3", "empty question"), ("3", "no text")]


@pytest.mark.parametrize(
    ("questions", "annotations", "message"),
    [
        (ANNOTATIONS, ANNOTATIONS, "questions.json has no list 'questions'; it has 'annotations'; is it the right file"),
        (QUESTIONS, QUESTIONS, "annotations.json has no list 'annotations'; it has 'questions'"),
        ({"questions": []}, {"annotations": []}, "questions.json gives no sample$"),
        (changed(QUESTIONS, 2, question_id=70), ANNOTATIONS, r"questions\[2\] has the question_id 70, which .*questions\[0\] has too"),
        (QUESTIONS, changed(ANNOTATIONS, 2, question_id=71), r"annotations\[2\] has the question_id 71, which .*annotations\[1\] has too"),
        (
            changed(QUESTIONS, 1, question_id=33),
            ANNOTATIONS,
            r"questions\[1\] has the question_id 33, which .*annotations.json does not have \(1 of 3",
        ),
        (
            {"questions": QUESTIONS["questions"][:1]},
            ANNOTATIONS,
            r"annotations\[0\] has the question_id 30, which .*questions.json does not have \(2 of 3 have no partner there\); are both",
        ),
        (changed(QUESTIONS, 1, image_id=7), ANNOTATIONS, r"question 30 is about image 7 in .*questions\[1\] and 3 in .*annotations\[0\]"),
        (changed(QUESTIONS, 1, image_id="3"), ANNOTATIONS, r"questions\[1\]: 'image_id' is '3' \(str\); expected a whole number"),
        (changed(QUESTIONS, 1, question=None), ANNOTATIONS, r"questions\[1\] has no 'question'; it has 'question_id', 'image_id'"),
        (changed(QUESTIONS, 1, question=5), ANNOTATIONS, r"questions\[1\]: 'question' is 5 \(int\); expected a text"),
        (QUESTIONS, changed(ANNOTATIONS, 0, answers=None), r"annotations\[0\]: 'answers' is 'None'; expected a list of objects"),
        (QUESTIONS, changed(ANNOTATIONS, 0, answers=[]), r"annotations\[0\]: 'answers' is '\[\]'; expected a list of objects"),
        (QUESTIONS, changed(ANNOTATIONS, 0, answers=["two"]), r"annotations\[0\].answers\[0\] is 'two'; expected an object"),
        (QUESTIONS, changed(ANNOTATIONS, 0, answers=[{"text": "two"}]), r"answers\[0\] has no 'answer'; it has 'text'"),
        (QUESTIONS, changed(ANNOTATIONS, 0, answer_type=1), r"annotations\[0\]: 'answer_type' is 1 \(int\); expected a text"),
    ],
)
def test_files_of_another_shape_or_of_two_splits_say_what_was_found(
    root: Path, questions: object, annotations: object, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read_vqa(**arguments(root, questions, annotations))


def test_missing_files_and_a_wrong_pattern_say_so(root: Path) -> None:
    given = arguments(root)
    for name in ("questions", "annotations"):
        with pytest.raises(DataError, match=r"annotation file .*absent.json does not exist"):
            read_vqa(**given | {name: root / "absent.json"})
    with pytest.raises(DataError, match=r"images folder .*absent does not exist"):
        read_vqa(**given | {"images": root / "absent"})
    with pytest.raises(ConfigError, match="unknown field 'image'"):
        read_vqa(**given | {"image_name": "image{image}.jpg"})


@pytest.mark.parametrize(("split", "images", "questions"), [("train", 662, 5721), ("val", 132, 1074)])
def test_real_questions_are_all_read(split: str, images: int, questions: int) -> None:
    folder = shared("data/daquar")
    source = read_vqa(
        images=folder / "images",
        questions=folder / f"annotations/OpenEnded_daquar_{split}_questions.json",
        annotations=folder / f"annotations/daquar_{split}_annotations.json",
        image_name="image{image_id}.jpg",
    )
    assert source.problems == ()
    assert (len(source), sum(len(source[i].questions) for i in range(len(source)))) == (images, questions)
    assert all(len(question.answers) == 10 for i in range(len(source)) for question in source[i].questions)
