"""What `adalink evaluate` hands in: official files with every item, test splits without answers, gaps refused; and scorers beside metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli_run import Done, Files, adalink, refused, train

from tasks.runs.results import add_metrics
from tasks.task import BLIND, TRAINED

SHORT = ("--data.train.scenes", "train/8", "--data.val.scenes", "val/2", "--train.steps", "1", "--train.batch_size", "2", "--generation.max_new_tokens", "3")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    for task in ("captioning", "vqa"):
        assert train(task, folder / task, small=SHORT).code == 0
    return {task: folder / task for task in ("captioning", "vqa")}


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path / "files", n=4)


def evaluate(run: Path, out: Path, *more: object, **val: object) -> Done:
    data = [part for name, value in ({"scenes": "null"} | val).items() for part in (f"--data.val.{name}", value)]
    return adalink("evaluate", "--config", run / "config.yaml", "--adapter", run / "adapter", "--out", out, *data, *more)



def rows(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text())
    return found


def test_captions_are_handed_in_under_the_official_name_with_every_picture(runs: dict[str, Path], files: Files, tmp_path: Path) -> None:
    (files.folder / "captions.json").rename(files.folder / "captions_val2014.json")
    given = {"images": files.folder / "pictures", "annotations": files.folder / "captions_val2014.json"}
    out = tmp_path / "out"
    done = evaluate(runs["captioning"], out, "--submission.algorithm", "mine", **given)
    assert done.code == 0, done
    official = out / "captions_val2014_mine_results.json"
    assert f"official result file: {official}\n" in done.out
    assert rows(official) == rows(out / "results.json")
    assert [row["image_id"] for row in rows(official)] == [0, 1, 2, 3]
    assert adalink("score", "coco", "--references", given["annotations"], "--results", official, "--resamples", "0").code in (0, 2)  # 2: all empty


def test_answers_are_handed_in_with_every_question_of_the_split(runs: dict[str, Path], files: Files, tmp_path: Path) -> None:
    given = {"images": files.folder / "pictures", "questions": files.folder / "questions.json", "annotations": files.folder / "answers.json"}
    out = tmp_path / "out"
    done = evaluate(runs["vqa"], out, "--submission.split", "val2014", image_name="{image_id}.png", **given)
    assert done.code == 0, done
    official = out / "v2_OpenEnded_mscoco_val2014_adalink_results.json"
    assert [row["question_id"] for row in rows(official)] == [row["question_id"] for row in files.questions["questions"]]
    scored = adalink("score", "vqa", "--questions", given["questions"], "--annotations", given["annotations"], "--results", official, "--json")
    values = json.loads((out / "metrics.json").read_text())["rows"][TRAINED]
    assert json.loads(scored.out)["figures"]["overall"]["value"] == values["accuracy"]


def test_answers_without_ids_count_in_an_evaluation_as_they_do_for_the_scorer(runs: dict[str, Path], files: Files, tmp_path: Path) -> None:
    for row in files.answers["annotations"]:
        row["answers"] = [{"answer": answer["answer"]} for answer in row["answers"]]
    files.save()
    given = {"images": files.folder / "pictures", "questions": files.folder / "questions.json", "annotations": files.folder / "answers.json"}
    assert evaluate(runs["vqa"], tmp_path / "out", image_name="{image_id}.png", **given).code == 0
    official = next((tmp_path / "out").glob("v2_*.json"))
    scored = adalink("score", "vqa", "--annotations", given["annotations"], "--results", official, "--json", "--resamples", "0")
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert json.loads(scored.out)["figures"]["overall"]["value"] == metrics["rows"][TRAINED]["accuracy"]


def test_a_test_split_of_questions_alone_is_answered_and_not_scored(runs: dict[str, Path], files: Files, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = evaluate(runs["vqa"], out, images=files.folder / "pictures", questions=files.folder / "questions.json", image_name="{image_id}.png")
    assert done.code == 0, done
    assert "the data set has no references or answers (a test split), so nothing was scored" in done.out
    metrics = json.loads((out / "metrics.json").read_text())
    assert (metrics["rows"], metrics["scorer"], metrics["scorers"]) == ({}, None, {})
    assert "nothing was scored" in metrics["note"]
    official = next(out.glob("v2_OpenEnded_mscoco_*_adalink_results.json"))
    assert [row["question_id"] for row in rows(official)] == [row["question_id"] for row in files.questions["questions"]]
    assert "not scored, for want of references" in (out / "report.html").read_text()


def test_a_test_split_of_pictures_alone_is_captioned_and_not_scored(runs: dict[str, Path], files: Files, tmp_path: Path) -> None:
    info = files.folder / "image_info_test2014.json"
    info.write_text(json.dumps({"images": files.captions["images"]}))
    done = evaluate(runs["captioning"], tmp_path / "out", images=files.folder / "pictures", image_info=info)
    assert done.code == 0, done
    assert "nothing was scored" in done.out
    assert len(rows(tmp_path / "out" / "captions_test2014_adalink_results.json")) == 4
    assert not (tmp_path / "out" / "captions_val_adalink_results.json").exists()


def test_a_karpathy_split_is_evaluated(runs: dict[str, Path], files: Files, tmp_path: Path) -> None:
    images = [
        {"imgid": i, "split": "test" if i % 2 else "train", "filename": f"{i}.png", "sentences": [{"raw": f"an image of {i}"}]} for i in range(4)
    ]
    (files.folder / "dataset_flickr8k.json").write_text(json.dumps({"images": images}))
    given = {"images": files.folder / "pictures", "karpathy": files.folder / "dataset_flickr8k.json", "split": "test"}
    done = evaluate(runs["captioning"], tmp_path / "out", **given)
    assert done.code == 0, done
    assert [row["image_id"] for row in rows(tmp_path / "out" / "captions_karpathy-test_adalink_results.json")] == [1, 3]
    both = [part for name in ("train", "val") for key, value in given.items() for part in (f"--data.{name}.{key}", value)]
    none = [part for name in ("train", "val") for part in (f"--data.{name}.scenes", "null")]
    trained = train("captioning", tmp_path / "run", *none, *both, "--data.train.split", "train", small=("--train.steps", "1", "--generation.max_new_tokens", "2"))
    assert trained.code == 0, trained


def test_a_gap_is_refused_before_anything_is_generated(runs: dict[str, Path], files: Files, tmp_path: Path) -> None:
    files.image(2).unlink()
    given: dict[str, object] = {"images": files.folder / "pictures", "questions": files.folder / "questions.json", "image_name": "{image_id}.png"}
    lost = [row["question_id"] for row in files.questions["questions"] if row["image_id"] == 2]
    sentence = refused(evaluate(runs["vqa"], tmp_path / "out", **given))
    n_all = len(files.questions["questions"])
    assert sentence.startswith(f"{len(lost)} of the {n_all} items of this split would be missing from its official result file (first: {lost[0]}")
    assert "2.png is missing" in sentence
    assert sentence.endswith("mend them, or give --submission.incomplete allow")
    assert not (tmp_path / "out").exists()
    allowed = evaluate(runs["vqa"], tmp_path / "out", "--submission.incomplete", "allow", **given)
    assert allowed.code == 0, allowed
    assert f"incomplete official result file: {tmp_path / 'out'}" in allowed.out
    assert f"{len(lost)} of {n_all} predictions are missing (first: {lost[0]}" in allowed.out
    assert len(rows(next((tmp_path / "out").glob("v2_*.json")))) == n_all - len(lost)


def test_a_picture_that_cannot_be_read_and_a_question_too_long_are_gaps(runs: dict[str, Path], files: Files, tmp_path: Path) -> None:
    given = {"images": files.folder / "pictures", "annotations": files.folder / "captions.json"}
    files.image(1).write_bytes(b"no image")
    assert "1 of the 4 items of this split would be missing from its official result file (first: 1)" in refused(evaluate(runs["captioning"], tmp_path / "a", **given))
    files.questions["questions"] = [row for row in files.questions["questions"] if row["image_id"] != 1]
    files.questions["questions"][0]["question"] = "word " * 600
    files.save()
    asked = {"images": files.folder / "pictures", "questions": files.folder / "questions.json", "image_name": "{image_id}.png"}
    sentence = refused(evaluate(runs["vqa"], tmp_path / "b", **asked))
    first = files.questions["questions"][0]["question_id"]
    assert f"1 of {len(files.questions['questions'])} predictions are missing (first: {first}); results.json holds the others" in sentence
    assert len(rows(tmp_path / "b" / "results.json")) == len(files.questions["questions"]) - 1  # found when it was too late: what there is stays
    assert list((tmp_path / "b").glob("v2_*")) == []


def test_a_limit_leaves_out_the_official_file_and_says_so(runs: dict[str, Path], tmp_path: Path) -> None:
    done = evaluate(runs["captioning"], tmp_path / "out", scenes="val/3", limit=2)
    assert done.code == 0, done
    assert "no official result file is written: limit leaves out 1 images of the split" in done.out
    assert list((tmp_path / "out").glob("captions_*")) == []
    assert len(rows(tmp_path / "out" / "results.json")) == 2
    done = evaluate(runs["captioning"], tmp_path / "all", "--submission.incomplete", "allow", scenes="val/3", limit=2)
    assert "incomplete official result file" in done.out


def test_a_name_that_the_server_cannot_read_is_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    assert "the algorithm 'my_run' cannot stand in a result file's name" in refused(
        evaluate(runs["captioning"], tmp_path / "out", "--submission.algorithm", "my_run", scenes="val/2")
    )


def test_every_figure_has_its_scorer_its_version_and_its_interval(runs: dict[str, Path]) -> None:
    for task, name in (("captioning", "COCO caption evaluation (equal to pycocoevalcap 1.2)"), ("vqa", "VQA accuracy, official (equal to GT-Vision-Lab/VQA a013f004)")):
        metrics = json.loads((runs[task] / "metrics.json").read_text())
        assert metrics["software"].startswith("adalink ")
        assert set(metrics["scorers"]) == set(metrics["rows"][TRAINED]) == set(metrics["rows"][BLIND])
        assert set(metrics["scorers"].values()) == {name}
        for row, values in metrics["rows"].items():
            for metric, value in values.items():
                low, high = metrics["intervals"][row][metric]
                assert low - 1e-9 <= value <= high + 1e-9 or value != value
        card = (runs[task] / "adapter" / "README.md").read_text()
        for metric, value in metrics["rows"][TRAINED].items():
            assert f"| {metric} | {value:.2f} | " in card
        assert name in card
        assert f"computed by {metrics['software']}" in card
        assert card.startswith("---\nlibrary_name: adalink\n")


def test_figures_replace_those_of_before_in_a_card(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# Adapter\n")
    for value in (1.0, 2.0):
        add_metrics(tmp_path, {"CIDEr": value}, {}, scorer="s 1", software="adalink 0", data="the data")
    assert (tmp_path / "README.md").read_text() == (
        "# Adapter\n\n## Evaluation\n\nOn the data; computed by adalink 0.\n\n"
        "| metric | value | 95 % interval | scorer |\n|---|---|---|---|\n| CIDEr | 2.00 |  | s 1 |\n"
    )
