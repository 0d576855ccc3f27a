"""Two files of results on the same items: differences with paired intervals, and what changed sides."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from cli_run import Done, Write, adalink, refused
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.evaluation.compare import Difference, compare_answers, compare_captions, comparison_json, comparison_table
from tasks.metrics.bootstrap import Interval, Resampling
from tasks.metrics.vqa import GradedQuestion

FEW = Resampling(n_resamples=50)
QUESTIONS = [
    GradedQuestion(question_id=i, answers=("yes",) * 9 + ("no",), question_type=f"type {i % 3}", answer_type="yes/no" if i % 2 else "other") for i in range(12)
]
GOOD, BAD = dict.fromkeys(range(12), "yes"), dict.fromkeys(range(12), "maybe")

def test_flips_go_both_ways_and_the_negative_rate_counts_what_was_right_and_is_wrong() -> None:
    before, after = {**GOOD, 0: "maybe", 1: "maybe"}, {**GOOD, 4: "no", 5: "maybe", 6: "maybe"}
    found = compare_answers(before, after, QUESTIONS, resampling=FEW)
    assert [pair.item for pair in found.right_to_wrong] == [5, 6, 4]  # "no" is right for one of ten people: a smaller loss
    assert {pair.item for pair in found.wrong_to_right} == {0, 1}
    assert (found.negative_flip_rate, found.positive_flip_rate) == (3 / 12, 2 / 12)
    assert (found.right_to_wrong[0].said_before, found.right_to_wrong[0].said_after) == ("yes", "maybe")


def test_every_type_has_its_difference_and_only_a_sure_one_is_marked() -> None:
    found = compare_answers(BAD, GOOD, QUESTIONS, resampling=FEW)
    assert {row.name for row in found.differences} == {
        "overall", "answer type: yes/no", "answer type: other", "question type: type 0", "question type: type 1", "question type: type 2"
    }  # fmt: skip
    assert all(row.is_sure and row.after - row.before == pytest.approx(100) for row in found.differences)
    one = compare_answers(BAD, {**BAD, 0: "yes"}, QUESTIONS, resampling=FEW)
    assert not one.differences[0].is_sure  # one of twelve: the interval holds zero
    assert one.differences[0].after == pytest.approx(100 / 12)


def test_captions_are_compared_by_their_cider() -> None:
    references = {1: ["a brown dog runs over green grass"], 2: ["two men look at a red ball"], 3: ["a plate of food on a table"]}
    before = {1: "a brown dog runs over green grass", 2: "a cat", 3: "a plate of food on a table"}
    after = {1: "a cat", 2: "two men look at a red ball", 3: "a plate of food on a table"}
    found = compare_captions(before, after, references, resampling=FEW)
    assert ([pair.item for pair in found.right_to_wrong], [pair.item for pair in found.wrong_to_right]) == ([1], [2])
    assert {row.name for row in found.differences} == {"Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"}


@given(st.lists(st.sampled_from(["yes", "no", "maybe", "The yes!", ""]), min_size=12, max_size=12))
@settings(max_examples=40, deadline=None)
def test_identical_answers_give_no_flip_and_no_difference(stated: list[str]) -> None:
    found = compare_answers(dict(enumerate(stated)), dict(enumerate(stated)), QUESTIONS, resampling=Resampling(n_resamples=5))
    assert found.right_to_wrong == found.wrong_to_right == []
    assert found.negative_flip_rate == found.positive_flip_rate == 0
    for row in found.differences:
        assert row.before == row.after
        assert row.interval is not None
        assert (row.interval.low, row.interval.high) == (0, 0)
        assert not row.is_sure


@given(st.lists(st.text(max_size=20) | st.just("a dog runs"), min_size=1, max_size=5))
@settings(max_examples=40, deadline=None)
def test_identical_captions_give_no_flip_and_no_difference(stated: list[str]) -> None:
    texts = dict(enumerate(stated))
    found = compare_captions(texts, texts, {i: ["a dog runs", "a brown dog"] for i in texts}, resampling=Resampling(n_resamples=5))
    assert found.right_to_wrong == found.wrong_to_right == []
    for row in found.differences:
        assert (row.before, row.n) == (row.after, len(stated))
        assert (row.interval is None) == (len(stated) == 1)
        assert row.interval is None or (row.interval.low, row.interval.high) == (0, 0)


def test_a_metric_of_one_question_has_no_interval_and_no_star_and_n_stands_in_every_row() -> None:
    asked = [GradedQuestion(question_id=i, answers=("yes",) * 10, question_type="one" if i == 0 else "more") for i in range(4)]
    found = compare_answers(dict.fromkeys(range(4), "no"), dict.fromkeys(range(4), "yes"), asked, resampling=FEW)
    assert [(row.name, row.n, row.is_sure) for row in found.differences] == [("overall", 4, True), ("question type: one", 1, False), ("question type: more", 3, True)]
    table = comparison_table(found)
    assert re.search(r"^question type: one +1 +0.0000 +100.0000 +\+100.0000$", table, re.MULTILINE)
    assert re.search(r"^question type: more +3 +0.0000 .*\*$", table, re.MULTILINE)
    assert [metric["n"] for metric in json.loads(comparison_json(found))["figures"].values()] == [4, 1, 3]


def test_what_bleu_adds_to_nothing_is_no_difference() -> None:
    interval = Interval(low=-9.68e-18, high=-1e-18)
    assert not Difference(name="Bleu_4", n=9, before=9.68e-18, after=0.0, interval=interval).is_sure


def test_the_table_shows_the_types_that_changed_most_and_counts_the_others() -> None:
    many = [GradedQuestion(question_id=i, answers=("yes",) * 10, question_type=f"type {i}", answer_type="other") for i in range(14)]
    before = dict.fromkeys(range(14), "yes")
    table = comparison_table(compare_answers(before, {**before, 13: "no"}, many, resampling=FEW))
    assert "question type: type 13" in table
    assert "and 4 question types that changed less" in table
    assert "right to wrong: 1 of 14 questions, negative flip rate 7.14 % (right from 50 on)\n  13: 'yes' (100.00) -> 'no' (0.00)" in table
    assert "VQA accuracy, official" in table


ANNOTATIONS = {
    "annotations": [
        {"question_id": i, "question_type": "t", "answer_type": "other", "answers": [{"answer": "yes", "answer_id": k} for k in range(9)] + [{"answer": "no", "answer_id": 9}]}
        for i in range(4)
    ]
}


def compared(write: Write, before: object, after: object, *more: object) -> Done:
    files = ("--before", write("a.json", before), "--after", write("b.json", after), "--annotations", write("ann.json", ANNOTATIONS))
    return adalink("compare", "vqa", *files, "--resamples", "20", *more)


def rows(*answers: str) -> list[dict[str, Any]]:
    return [{"question_id": i, "answer": answer} for i, answer in enumerate(answers)]


def test_two_files_of_answers_are_compared_from_the_command_line(write: Write, tmp_path: Path) -> None:
    done = compared(write, rows("yes", "yes", "x", "x"), rows("x", "yes", "yes", "x"))
    assert done.code == 0, done
    assert "right to wrong: 1 of 4 questions, negative flip rate 25.00 %" in done.out
    assert "wrong to right: 1 of 4 questions, positive flip rate 25.00 %" in done.out
    found = json.loads(compared(write, rows("yes", "yes", "x", "x"), rows("x", "yes", "yes", "x"), "--json", "--items", tmp_path / "i.json").out)
    assert found["negative_flip_rate"] == 0.25
    assert found["right_to_wrong"] == [{"item": 0, "said_before": "yes", "said_after": "x", "before": 100.0, "after": 0.0}]
    assert found["figures"]["overall"]["difference"] == 0
    assert len(json.loads((tmp_path / "i.json").read_text())) == 4
    # "no" is right for one of ten (30 percent), so it counts as right from 30 on only
    assert json.loads(compared(write, rows(*["yes"] * 4), rows("no", *["yes"] * 3), "--json", "--right-from", "20").out)["negative_flip_rate"] == 0


def test_two_files_of_captions_are_compared_from_the_command_line(write: Write) -> None:
    references = {"images": [{"id": 1}, {"id": 2}], "annotations": [{"image_id": 1, "caption": "a dog runs on grass"}, {"image_id": 2, "caption": "two red cats"}]}
    files = ("--references", write("r.json", references), "--resamples", "20")
    good = write("a.json", [{"image_id": 1, "caption": "a dog runs on grass"}, {"image_id": 2, "caption": "a cow"}])
    bad = write("b.json", [{"image_id": 2, "caption": "a cow"}, {"image_id": 1, "caption": "a cow"}])
    done = adalink("compare", "coco", "--before", good, "--after", bad, *files)
    assert "right to wrong: 1 of 2 images, negative flip rate 50.00 % (right from 100 on)" in done.out, done
    assert re.search(r"^CIDEr +2 +[56]\d\d\.\d{4} +\d+\.\d{4} +-[45]\d\d\.\d{4} ", done.out, re.MULTILINE)
    empty = write("c.json", [{"image_id": 2, "caption": ""}, {"image_id": 1, "caption": "x"}])
    assert f"empty captions in {empty}: 1 of 2 (first: image 2)" in adalink("compare", "coco", "--before", good, "--after", empty, *files).out


def test_files_of_other_questions_are_named(write: Write) -> None:
    assert "1 questions of" in refused(compared(write, rows("yes", "yes", "x", "x"), rows("x", "yes", "yes")))
    assert "(first: 4)" in refused(compared(write, rows("x", "x", "x", "x", "x"), rows("x", "yes", "yes", "x")))


def test_help_and_missing_arguments(write: Write) -> None:
    assert "compare RUN_A RUN_B" in adalink("compare", "--help").out
    assert "RUN_A" in adalink("compare", "runs", "--help").out
    assert "after is not given" in refused(adalink("compare", "only_one"))
