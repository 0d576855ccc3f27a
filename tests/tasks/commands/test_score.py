"""The commands that score a file: what they print and write, and what they say about files that do not fit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from cli_run import Done, Write, adalink, refused
from shared import fixtures

from tasks.metrics.captions import score_captions

REFERENCES: dict[str, Any] = {
    "images": [{"id": 3}, {"id": 7}],
    "annotations": [
        {"image_id": 3, "caption": "A dog runs over green grass."},
        {"image_id": 3, "caption": "a brown dog on grass"},
        {"image_id": 7, "caption": "Two men look at a red ball."},
    ],
}
RESULTS = [{"image_id": 7, "caption": "two men and a ball"}, {"image_id": 3, "caption": "a dog runs on grass"}]
ANSWERS = {
    "annotations": [
        {"question_id": 1, "question_type": "is it", "answer_type": "yes/no", "answers": [{"answer": "yes", "answer_id": i} for i in range(10)]},
        {"question_id": 2, "question_type": "what", "answer_type": "other", "answers": [{"answer": "abc"[i % 3], "answer_id": i} for i in range(10)]},
    ]
}
ANSWERED = [{"question_id": 1, "answer": "Yes!"}, {"question_id": 2, "answer": "b"}]
QUESTIONS = {"questions": [{"question_id": 1, "image_id": 1, "question": "Is it?"}, {"question_id": 2, "image_id": 1, "question": "What?"}]}

def scored(task: str, *more: object, **files: Path) -> Done:
    """`adalink score TASK --name FILE ...` with few resamples."""
    return adalink("score", task, *(part for name, path in files.items() for part in (f"--{name}", path)), "--resamples", "20", *more)


def metrics(done: Done) -> dict[str, Any]:
    assert done.code == 0, done
    document: dict[str, Any] = json.loads(done.out)
    return document


def test_captions_are_scored_into_a_table_that_names_scorer_version_and_files(write: Write) -> None:
    done = scored("coco", references=write("refs.json", REFERENCES), results=write("res.json", RESULTS))
    expected = score_captions(
        {row["image_id"]: row["caption"] for row in RESULTS},
        {3: [row["caption"] for row in REFERENCES["annotations"][:2]], 7: ["Two men look at a red ball."]},
    )
    assert done.code == 0, done
    assert "scorer: COCO caption evaluation (equal to pycocoevalcap 1.2)" in done.out
    assert "2 images; computed by adalink " in done.out
    assert "res.json" in done.out
    for name, value in expected.corpus.items():
        assert re.search(rf"^{name} +{value:.4f}  +[0-9.]+ \.\. [0-9.]+ +{100 * value:.2f}$", done.out, re.MULTILINE)
    assert "95 % interval" in done.out
    found = metrics(scored("coco", "--json", references=write("refs.json", REFERENCES), results=write("res.json", RESULTS)))["figures"]
    assert {name: metric["percent"] for name, metric in found.items()} == {name: 100 * value for name, value in expected.corpus.items()}


def test_json_holds_every_figure_with_its_scorer_and_interval(write: Write) -> None:
    files = {"annotations": write("ann.json", ANSWERS), "results": write("res.json", ANSWERED), "questions": write("q.json", QUESTIONS)}
    found = metrics(scored("vqa", "--json", **files))
    assert (found["n_items"], found["unit"]) == (2, "questions")
    assert found["software"].startswith("adalink ")
    assert {name: round(metric["value"], 2) for name, metric in found["figures"].items()} == {
        "overall": 45.0,  # "Yes!" is not "yes" where all agree; "b" is right for three of ten
        "answer type: yes/no": 0.0,
        "answer type: other": 90.0,
        "question type: is it": 0.0,
        "question type: what": 90.0,
    }
    for metric in found["figures"].values():
        assert metric["scorer"].startswith("VQA accuracy, official")
        assert metric["interval"][0] <= metric["value"] <= metric["interval"][1]


def test_the_normalized_scorer_is_named_and_mends_unanimous_answers(write: Write) -> None:
    files = {"annotations": write("ann.json", ANSWERS), "results": write("res.json", ANSWERED)}
    assert metrics(scored("vqa", "--scorer", "normalized", "--json", **files))["figures"]["overall"]["value"] == pytest.approx(95)
    assert "scorer: VQA accuracy, normalized" in scored("vqa", "--scorer", "normalized", **files).out
    assert "scorer is best: expected one of 'official', 'normalized'" in refused(scored("vqa", "--scorer", "best", **files))


def test_items_are_written_with_their_texts(write: Write, tmp_path: Path) -> None:
    captions = {"references": write("refs.json", REFERENCES), "results": write("res.json", RESULTS)}
    assert scored("coco", "--items", tmp_path / "images.json", **captions).code == 0
    images = json.loads((tmp_path / "images.json").read_text())
    assert [row["image_id"] for row in images] == [3, 7]
    assert set(images[0]) == {"image_id", "caption", "Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"}
    answers = {"annotations": write("ann.json", ANSWERS), "results": write("a.json", ANSWERED)}
    assert scored("vqa", "--items", tmp_path / "questions.json", **answers).code == 0
    assert json.loads((tmp_path / "questions.json").read_text())[1] == {
        "question_id": 2,
        "answer": "b",
        "accuracy": pytest.approx(90),
        "answer_type": "other",
        "question_type": "what",
    }
    assert "cannot be written" in refused(scored("vqa", "--items", tmp_path / "absent" / "x.json", **answers))


def test_without_resamples_there_is_no_interval(write: Write) -> None:
    files = {"references": write("refs.json", REFERENCES), "results": write("res.json", RESULTS)}
    found = metrics(scored("coco", "--resamples", "0", "--json", **files))
    assert {metric["interval"] for metric in found["figures"].values()} == {None}
    assert refused(scored("coco", "--resamples", "-1", **files)).startswith("the number of resamples is -1; give 0")


def test_a_split_takes_its_references_from_karpathys_file(write: Write) -> None:
    images = [
        {"split": split, "cocoid": image, "filename": "a.jpg", "sentences": [{"raw": "a dog on grass"}, {"raw": "a cat"}]}
        for split, image in (("train", 1), ("test", 3), ("test", 7))
    ]
    files = {"references": write("dataset_coco.json", {"images": images}), "results": write("res.json", RESULTS)}
    done = scored("coco", "--split", "test", **files)
    assert "2 images; " in done.out
    assert "split: test" in done.out
    assert "has no split 'val'; it has test, train" in refused(scored("coco", "--split", "val", **files))


def test_the_recorded_official_files_give_the_official_figures() -> None:
    folder = fixtures("vqa")
    for results in sorted(folder.glob("official_format_*_results.json")):
        stem = results.name.removesuffix("_results.json")
        files = {name: folder / f"{stem}_{name}.json" for name in ("questions", "annotations")}
        found = metrics(scored("vqa", "--resamples", "0", "--json", **files, results=results))
        cases = json.loads((folder / f"vqa_cases_{stem.removeprefix('official_format_')}.json").read_text())
        assert round(found["figures"]["overall"]["value"], 12) == cases["aggregates"]["n12"]["overall"]


ONE_EACH = {"annotations": [{"question_id": i, "answers": [{"answer": text, "answer_id": 1}]} for i, text in ((1, "yes"), (2, "liver"))]}


def test_a_file_with_one_answer_each_is_scored_by_the_exact_match_too(write: Write, tmp_path: Path) -> None:
    files = {"annotations": write("ann.json", ONE_EACH), "results": write("res.json", [{"question_id": 1, "answer": "Yes!"}, {"question_id": 2, "answer": "heart"}])}
    done = scored("vqa", "--items", tmp_path / "items.json", **files)
    assert "2 of 2 questions (first: question 1, with 1), so the exact match after the official normalisation is given" in done.out
    found = metrics(scored("vqa", "--json", **files))
    assert {name: metric["value"] for name, metric in found["figures"].items()} == {"overall": 0.0, "exact match": 50.0}
    assert found["figures"]["exact match"]["scorer"].startswith("exact match with one of the answers")
    assert found["figures"]["exact match"]["interval"] is not None
    assert [(row["accuracy"], row["exact_match"]) for row in json.loads((tmp_path / "items.json").read_text())] == [(0.0, 100.0), (0.0, 0.0)]
    asked = metrics(scored("vqa", "--json", "--scorer", "exact", **files))
    assert (asked["figures"]["overall"]["value"], asked["notes"]) == (50.0, [])
    compared = adalink("compare", "vqa", "--before", files["results"], "--after", write("b.json", [{"question_id": 1, "answer": "no"}, {"question_id": 2, "answer": "liver"}]), "--annotations", files["annotations"])
    assert "exact match with one of the answers" in compared.out
    assert "wrong to right: 1 of 2 questions" in compared.out


def test_an_empty_caption_is_scored_and_said(write: Write) -> None:
    files = {"references": write("refs.json", REFERENCES), "results": write("res.json", [DOG, {"image_id": 7, "caption": " \n"}])}
    sentence = f"empty captions in {files['results']}: 1 of 2 (first: image 7), scored as the official evaluation does; did the model end at once?"
    found = metrics(scored("coco", "--json", **files))
    assert found["notes"] == [sentence]
    expected = {3: ["A dog runs over green grass.", "a brown dog on grass"], 7: ["Two men look at a red ball."]}
    assert found["figures"]["CIDEr"]["value"] == score_captions({3: "a dog", 7: ""}, expected).corpus["CIDEr"]
    assert sentence in scored("coco", **files).out
    compared = adalink("compare", "coco", "--before", files["results"], "--after", write("b.json", RESULTS), "--references", files["references"])
    assert compared.code == 0
    assert sentence in compared.out


def test_meteor_without_java_says_what_to_install(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    files = {"references": write("refs.json", REFERENCES), "results": write("res.json", RESULTS)}
    assert re.search("Java|pip install 'adalink\\[coco\\]'", refused(scored("coco", "--java", "[METEOR]", **files)))


DOG = {"image_id": 3, "caption": "a dog"}
SEVEN = [{"image_id": i, "caption": "x"} for i in range(100, 107)]

@pytest.mark.parametrize(
    ("references", "results", "message"),
    [
        (REFERENCES, [DOG], r"1 images of .*refs.json have no caption in .*res.json \(first: 7\); 0 of 1 results .*1 of 2 images have no result"),
        (REFERENCES, [*RESULTS, {"image_id": 9, "caption": "x"}], r"1 images of .*res.json are not in .*refs.json \(first: 9\); 1 of 3 results"),
        (REFERENCES, SEVEN, r"7 images .*\(first: 100, 101, 102, 103, 104, ...\); 7 of 7 .*one split"),
        (REFERENCES, [*RESULTS, DOG], r"1 images have more than one caption in .*\(first: 3\)"),
        (REFERENCES, {"a": 1}, r"holds an object with 'a'; expected a list of \{\"image_id\""),
        (REFERENCES, [{"image_id": "3", "caption": "x"}], r"\[0\]: 'image_id' is '3' \(str\); expected a whole number"),
        (REFERENCES, [{"image_id": 3}], r"\[0\] has no 'caption'"),
        ({"images": []}, RESULTS, "has no list 'annotations'; it has 'images'"),
        ({**REFERENCES, "images": [{"id": 3}]}, RESULTS, r"1 images have captions in .* and are not in its list 'images' \(first: 7\)"),
        ({**REFERENCES, "images": [{"id": 3}, {"id": 7}, {"id": 8}]}, RESULTS, r"1 images of .* have no caption \(first: 8\)"),
        ({**REFERENCES, "images": [{"id": 3}, {"id": 3}, {"id": 7}]}, RESULTS, r"1 image ids stand more than once .*\(first: 3\)"),
    ],
)
def test_caption_files_that_do_not_fit_are_named_with_offenders_and_counts(write: Write, references: object, results: object, message: str) -> None:
    sentence = refused(scored("coco", references=write("refs.json", references), results=write("res.json", results)))
    assert re.search(message, sentence), sentence


@pytest.mark.parametrize(
    ("questions", "results", "message"),
    [
        (QUESTIONS, ANSWERED[:1], r"1 questions of .*ann.json are not in .*res.json \(first: 2\)"),
        (QUESTIONS, [*ANSWERED, {"question_id": 5, "answer": "x"}], r"1 questions of .*res.json are not in .*ann.json \(first: 5\)"),
        ({"questions": QUESTIONS["questions"][:1]}, ANSWERED, r"1 questions of .*ann.json are not in .*q.json \(first: 2\); .*one split"),
        ({"questions": [{**QUESTIONS["questions"][0], "question_id": 9}]}, ANSWERED, r"1 questions of .*q.json are not in .*ann.json \(first: 9\)"),
        (QUESTIONS, [*ANSWERED, ANSWERED[0]], r"1 questions have more than one answer in .*\(first: 1\)"),
        (QUESTIONS, [{"question_id": i, "answer": "x"} for i in range(50, 60)], r"10 questions .*first: 50, 51, 52, 53, 54, ...\); 10 of 10 .*unknown, 2 of 2 .*one split"),
        (QUESTIONS, {"results": 3}, r"'results' is '3'; expected an object"),
        (QUESTIONS, "oops", r"res.json holds 'oops'; expected a list of \{\"question_id\": 42, \"answer\": \"yes\"\}"),
        (QUESTIONS, [{"question_id": 1, "answer": None}], r"\[0\]: 'answer' is None \(NoneType\); expected a text"),
        ({"questions": 5}, ANSWERED, r"'questions' is 5 \(int\); expected a list"),
    ],
)
def test_answer_files_of_other_questions_are_named(write: Write, questions: object, results: object, message: str) -> None:
    files = {"annotations": write("ann.json", ANSWERS), "questions": write("q.json", questions), "results": write("res.json", results)}
    sentence = refused(scored("vqa", **files))
    assert re.search(message, sentence), sentence


def test_files_that_are_not_there_or_no_json_are_named(write: Write, tmp_path: Path) -> None:
    references = write("refs.json", REFERENCES)
    assert refused(scored("coco", references=references, results=tmp_path / "no.json")).endswith("no.json does not exist; check the path")
    (tmp_path / "cut.json").write_text('[{"image_id": 3,')
    assert "cut.json is not JSON" in refused(scored("coco", references=references, results=tmp_path / "cut.json"))
    assert "references is not given, and has no default" in refused(adalink("score", "coco", "--results", references))


def test_the_file_of_a_benchmark_decides_its_scorer_and_its_ids(write: Write) -> None:
    rows = [{"questionId": 337, "question": "date?", "image": "documents/a_1.png", "docId": 2, "answers": ["1/8/93"]},
            {"questionId": 338, "question": "who?", "image": "documents/a_1.png", "docId": 2, "answers": ["R. Cook"]}]  # fmt: skip
    docvqa = write("val_v1.0.json", {"dataset_name": "docvqa", "data": rows})
    answers = write("res.json", [{"questionId": 337, "answer": "1/8/1993"}, {"questionId": 338, "answer": "nobody"}])
    done = scored("vqa", annotations=docvqa, results=answers)
    assert "scorer: ANLS, threshold 0.5" in done.out
    assert metrics(scored("vqa", "--json", annotations=docvqa, results=answers))["figures"]["overall"]["value"] == pytest.approx(37.5)
    charts = write("test_human.json", [{"imgname": "1.png", "query": "how many?", "label": "14"}])
    assert "scorer: relaxed accuracy" in scored("vqa", annotations=charts, results=write("c.json", [{"question_id": 0, "answer": "14.2"}])).out
    problems = {str(k): {"question": "?", "choices": ["a", "b"], "answer": 1, "image": "image.png", "split": split} for k, split in enumerate(["val", "test"])}
    science, given = write("problems.json", problems), write("s.json", [{"question_id": "1", "answer": "B"}])
    assert "100.00" in scored("vqa", "--split", "test", annotations=science, results=given).out
    assert "holds several splits, test, val: give split" in refused(scored("vqa", annotations=science, results=given))
    assert "holds one split: leave split 'x' out" in refused(scored("vqa", "--split", "x", annotations=write("v.json", ANSWERS), results=given))
