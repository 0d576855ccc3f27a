"""Bad data: one sentence where nothing can be done; else skipped, counted, named, and stopped over the budget."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_run import SMALL, Done, Files, refused, train

from multimodal.data.shards.writer import write_shards
from tasks.data.coco import read_coco_captions

SHORT = ("--train.steps", "4", "--train.batch_size", "2", "--generation.max_new_tokens", "2", "--data.val.limit", "3")
N_STEPS_TO_MEET_ALL = 4  # 4 x 2 images of 6


def run(files: Files, out: Path, *more: object, task: str = "captioning", val: Files | None = None) -> Done:
    return train(task, out, *files.as_data("train", task), *(val or files).as_data("val", task), *more, small=SHORT)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path / "files")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Nothing is wrong with these; not to be changed."""
    return Files(tmp_path_factory.mktemp("whole") / "files", n=3)


def damage(files: Files) -> None:
    """One image of each kind of trouble; 4 and 5 are left whole."""
    files.image(0).unlink()
    files.image(1).write_bytes(files.image(1).read_bytes()[:300])
    files.captions["annotations"] = [row for row in files.captions["annotations"] if row["image_id"] != 2]
    next(row for row in files.captions["annotations"] if row["image_id"] == 3)["caption"] = "word " * 400
    files.save()


REASONS = {"0": "missing file", "1": "truncated", "2": "no text", "3": "text too long"}


def test_bad_samples_are_skipped_counted_and_named(files: Files, whole: Files, tmp_path: Path) -> None:
    damage(files)
    out = tmp_path / "run"
    done = run(files, out, "--train.bad_samples", "4", "--train.features", "encode", "--captioning.captions_per_image", "0", val=whole)
    assert done.code == 0, done
    bad = [json.loads(line) for line in (out / "bad_samples.jsonl").read_text().splitlines()]
    assert {row["key"]: row["reason"] for row in bad} == REASONS
    assert len(bad) == 4  # once each, though every image was met more than once
    assert str(files.image(0)) in bad[0]["detail"] + bad[1]["detail"]
    skipped = next(line for line in done.err.splitlines() if line.startswith("skipped in training: "))
    assert all(f"1 {reason} ({key})" in skipped for key, reason in REASONS.items())
    page = (out / "report.html").read_text()
    assert all(reason in page for reason in REASONS.values())
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == [2, N_STEPS_TO_MEET_ALL]  # the first step read two bad images: it was none


@pytest.mark.parametrize("options", [("--train.features", "encode", "--train.workers", "1"), ("--train.features", "memory")], ids=" ".join)
def test_over_the_budget_the_run_stops_and_leaves_nothing(options: tuple[str, ...], files: Files, whole: Files, tmp_path: Path) -> None:
    damage(files)
    sentence = refused(run(files, tmp_path / "run", "--train.bad_samples", "3", "--captioning.captions_per_image", "0", *options, val=whole))
    assert sentence.startswith("4 bad samples, and at most 3 are allowed: ")
    assert sentence.endswith("; mend or remove them, or allow more bad samples")
    assert all(f"{reason} ({key})" in sentence for key, reason in REASONS.items())
    assert not (tmp_path / "run").exists()


def test_bad_pictures_of_the_validation_data_stop_the_run_before_it_trains(files: Files, whole: Files, tmp_path: Path) -> None:
    damage(files)
    done = run(whole, tmp_path / "run", "--train.bad_samples", "2", "--data.val.limit", "0", val=files)
    assert refused(done).startswith("3 bad samples, and at most 2 are allowed: 1 missing file (0), 1 no text (2), 1 truncated (1)")
    assert "step 1" not in done.err
    assert not (tmp_path / "run").exists()


def test_bad_pictures_of_the_validation_data_are_counted_in_metrics_and_report(files: Files, whole: Files, tmp_path: Path) -> None:
    damage(files)
    out = tmp_path / "run"
    done = run(whole, out, "--train.steps", "1", "--data.val.limit", "0", val=files)
    assert done.code == 0, done
    assert "skipped in evaluation: 1 missing file (0), 1 no text (2), 1 truncated (1)" in done.err
    metrics = json.loads((out / "metrics.json").read_text())
    assert {row["key"]: row["reason"] for row in metrics["bad_samples"]} == {key: REASONS[key] for key in "012"}
    assert [row["image_id"] for row in json.loads((out / "results.json").read_text())] == [3, 4, 5]
    assert metrics["items"] == 3
    assert "truncated" in (out / "report.html").read_text()


def test_a_question_too_long_is_a_bad_sample_of_its_evaluation(files: Files, tmp_path: Path) -> None:
    files.questions["questions"][0]["question"] = "word " * 400
    files.save()
    out = tmp_path / "run"
    done = run(files, out, task="vqa")
    assert done.code == 0, done
    assert "skipped in training: 1 text too long (0)" in done.err
    assert "skipped in evaluation: 1 text too long (0)" in done.err
    answered = {row["question_id"] for row in json.loads((out / "results.json").read_text())}
    asked = [row["question_id"] for row in files.questions["questions"] if row["image_id"] < 3]
    assert answered == set(asked[1:])


def test_damaged_shards_are_counted_in_training_and_evaluation(whole: Files, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    source = read_coco_captions(images=whole.folder / "pictures", annotations=whole.folder / "captions.json")
    write_shards(source, folder, samples_per_shard=2, budget=0, skipped=(), workers=1)
    path = sorted(folder.glob("*.tar"))[0]
    with tarfile.open(path) as tar:
        start = next(member.offset_data for member in tar if member.name.endswith(".png"))
    data = bytearray(path.read_bytes())
    data[start + 300] ^= 255
    path.write_bytes(data)
    for workers in ("0", "1"):
        out = tmp_path / f"run{workers}"
        shards = [part for split in ("train", "val") for part in (f"--data.{split}.scenes", "null", f"--data.{split}.shards", folder)]
        done = train("captioning", out, *shards, "--train.workers", workers, small=SHORT)
        assert done.code == 0, done
        assert "skipped in training: 1 damaged bytes (0)" in done.err
        assert "skipped in evaluation: 1 damaged bytes (0)" in done.err
        assert len(json.loads((out / "results.json").read_text())) == 2


def empty_captions(files: Files) -> None:
    files.captions = {"images": [], "annotations": []}


def no_text_at_all(files: Files) -> None:
    files.captions["annotations"] = []


def names_no_image(files: Files) -> None:
    files.captions["annotations"].append({"id": 999, "image_id": 77, "caption": "a cat"})


def without_ids(files: Files) -> None:
    del files.captions["images"][2]["id"]


def no_list(files: Files) -> None:
    files.captions = {"images": files.captions["images"]}


FATAL: list[tuple[Callable[[Files], None], str]] = [
    (names_no_image, "annotations[30] belongs to image 77, which the list 'images' of"),
    (empty_captions, "captions.json gives no sample"),
    (no_text_at_all, "captions.json gives no sample; 6 samples cannot be used, the first because image 0 (0.png) has no caption"),
    (without_ids, "images[2] has no 'id'"),
    (no_list, "captions.json has no list 'annotations'; it has 'images'; is it the right file?"),
]


@pytest.mark.parametrize(("change", "expected"), FATAL, ids=[change.__name__ for change, _ in FATAL])
def test_annotations_that_cannot_be_used_are_one_sentence(change: Callable[[Files], None], expected: str, files: Files, tmp_path: Path) -> None:
    change(files)
    files.save()
    assert expected in refused(run(files, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_empty_and_mismatched_questions_are_one_sentence(files: Files, tmp_path: Path) -> None:
    files.answers["annotations"].pop()
    files.save()
    assert "which" in refused(run(files, tmp_path / "run", task="vqa"))
    files.questions, files.answers = {"questions": []}, {"annotations": []}
    files.save()
    assert "questions.json gives no sample" in refused(run(files, tmp_path / "run", task="vqa"))
    assert not (tmp_path / "run").exists()


MISSING = [
    ("--data.train.images", "no/such/folder", "the images folder no/such/folder does not exist"),
    ("--data.train.annotations", "no.json", "the annotation file no.json does not exist"),
    ("--data.train.image_name", "{id}.png", "has the unknown field 'id'"),
]


@pytest.mark.parametrize(("option", "value", "expected"), MISSING, ids=[option for option, _, _ in MISSING])
def test_missing_files_of_a_data_set_are_one_sentence(option: str, value: str, expected: str, whole: Files, tmp_path: Path) -> None:
    assert expected in refused(run(whole, tmp_path / "run", option, value))
    assert not (tmp_path / "run").exists()


SCENES = {
    "test/3": "scenes is 'test/3': give SPLIT/SIZE, for instance train/2000 or val/200",
    "train": "scenes is 'train': give SPLIT/SIZE",
    "train/many": "scenes is 'train/many': give SPLIT/SIZE",
    "train/²": "scenes is 'train/²': give SPLIT/SIZE",
    "train/0": "the size of Scenes is 0: give a number of images from 1",
}


@pytest.mark.parametrize("scenes", SCENES)
def test_scenes_that_there_are_not_are_one_sentence(scenes: str, tmp_path: Path) -> None:
    assert refused(train("captioning", tmp_path / "run", "--data.val.scenes", scenes)).startswith(SCENES[scenes])


def test_shards_that_are_not_there_are_one_sentence(tmp_path: Path) -> None:
    sentence = refused(train("captioning", tmp_path / "run", "--data.val.scenes", "null", "--data.val.shards", tmp_path / "no"))
    assert str(tmp_path / "no") in sentence
    assert not (tmp_path / "run").exists()


def test_the_data_of_another_task_is_refused(whole: Files, tmp_path: Path) -> None:
    captions, questions = (whole.as_data("train", task) + whole.as_data("val", task) for task in ("captioning", "vqa"))
    sentence = refused(train("captioning", tmp_path / "run", *questions, small=SHORT))
    assert sentence == "3 of 3 images have no caption to score against, such as image 0: give their captions"
    sentence = refused(train("vqa", tmp_path / "run", *captions, small=SHORT))
    assert sentence.startswith("the data set has no question, and the task vqa needs them")
    assert not (tmp_path / "run").exists()


def test_a_text_and_its_answer_beyond_the_positions_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "run"
    sentence = refused(train("captioning", out, "--generation.max_new_tokens", "510", "--data.val.scenes", "val/11", "--train.bad_samples", "9"))
    assert sentence.startswith("11 bad samples, and at most 9 are allowed: 11 text too long")
    sentence = refused(train("captioning", out, "--methods.prompt.length", "600", "--methods.prompt.init_std", "0.1", "--train.bad_samples", "0"))
    assert sentence.startswith("4 bad samples, and at most 0 are allowed: 4 text too long")
    assert not out.exists()
    assert SMALL
