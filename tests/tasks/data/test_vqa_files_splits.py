"""VQAv2's splits by name, from files named as the official ones are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adalink.errors import ConfigError, DataError
from tasks.data.sources import DataConfig
from tasks.data.vqa import read_vqa_split, split_parts

SPLITS = {"train2014": 1, "val2014": 2, "test2015": 3, "test-dev2015": 3}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for stated, image in SPLITS.items():
        ids = {"question_id": 10 * image, "image_id": image}
        questions = {"data_type": "mscoco", "data_subtype": stated, "questions": [{**ids, "question": "is it?"}]}
        (tmp_path / f"v2_OpenEnded_mscoco_{stated}_questions.json").write_text(json.dumps(questions))
        if not stated.startswith("test"):
            row = {**ids, "question_type": "is it", "answer_type": "yes/no", "answers": [{"answer": "yes", "answer_id": i} for i in range(10)]}
            (tmp_path / f"v2_mscoco_{stated}_annotations.json").write_text(json.dumps({"annotations": [row]}))
    (tmp_path / "images").mkdir()
    return tmp_path


def image_files(files: Path, *, nested: bool) -> Path:
    for stated, image in SPLITS.items():
        folder = stated.replace("test-dev", "test")
        path = files / "images" / (folder if nested else "")
        path.mkdir(exist_ok=True)
        (path / f"COCO_{folder}_{image:012d}.jpg").touch()
    return files / "images"


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(
    ("split", "asked", "answered"),
    [("train", [10], True), ("val2014", [20], True), ("train+val", [10, 20], True), ("test", [30], False), ("test-dev", [30], False)],
)
def test_splits_are_read_by_name(files: Path, nested: bool, split: str, asked: list[int], answered: bool) -> None:
    config = DataConfig(images=image_files(files, nested=nested), vqav2=files, split=split)
    opened = config.open()
    found = [question for i in range(len(opened.source)) for question in opened.source[i].questions]
    assert [question.question_id for question in found] == asked == list(opened.item_ids)
    assert {len(question.answers) for question in found} == {10 if answered else 0}
    assert opened.problems == ()


def test_problems_of_every_part_are_kept(files: Path) -> None:
    images = image_files(files, nested=True)
    (images / "train2014" / "COCO_train2014_000000000001.jpg").unlink()
    with pytest.raises(DataError, match="gives no sample"):
        read_vqa_split(files, images, "train")
    (images / "train2014" / "COCO_train2014_000000000001.jpg").touch()
    path = files / "v2_OpenEnded_mscoco_val2014_questions.json"
    document: dict[str, Any] = json.loads(path.read_text())
    document["questions"].append({"question_id": 21, "image_id": 9, "question": "?"})
    path.write_text(json.dumps(document))
    annotations = files / "v2_mscoco_val2014_annotations.json"
    rows = json.loads(annotations.read_text())["annotations"]
    annotations.write_text(json.dumps({"annotations": [*rows, {**rows[0], "question_id": 21, "image_id": 9}]}))
    source = read_vqa_split(files, images, "train+val")
    assert source.item_ids == (10, 20, 21)
    assert [problem.key for problem in source.problems] == ["9"]


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("dev", "VQAv2 has no split 'dev'; it has train, val, test, test-dev; several are joined as in train\\+val"),
        ("val+val2014", "holds the same questions twice"),
        ("test+test-dev", "holds the same questions twice"),
        ("val+test", "mixes questions with answers and without"),
    ],
)
def test_splits_that_there_are_not_are_named(split: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        split_parts(split)


def test_files_that_are_missing_are_named_with_the_folder(files: Path) -> None:
    (files / "v2_mscoco_val2014_annotations.json").unlink()
    with pytest.raises(DataError, match=r"v2_mscoco_val2014_annotations.json is not there; VQAv2's split val needs it: unpack the official files into"):
        read_vqa_split(files, files / "images", "val")
