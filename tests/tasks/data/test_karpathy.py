"""Karpathy's splits, read as the data of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adalink.errors import ConfigError, DataError
from tasks.data.coco import read_karpathy
from tasks.data.sources import DataConfig


def image(number: int, split: str, **fields: Any) -> dict[str, Any]:
    return {"imgid": number, "split": split, "filename": f"{number}.jpg", "sentences": [{"raw": f" a dog {number} "}, {"raw": "a cat"}], **fields}


COCO = [
    image(0, "train", cocoid=500, filepath="train2014"),
    image(1, "restval", cocoid=400, filepath="val2014"),
    image(2, "val", cocoid=300, filepath="val2014"),
    image(3, "test", cocoid=200, filepath="val2014"),
    image(4, "test", cocoid=100, filepath="val2014"),
]
FLICKR = [image(number, split) for number, split in enumerate(("train", "val", "test"))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for part in ("train2014", "val2014"):
        (tmp_path / "images" / part).mkdir(parents=True)
    return tmp_path


def written(folder: Path, images: list[dict[str, Any]], *, nested: bool = False) -> Path:
    for row in images:
        (folder / "images" / (row["filepath"] if nested else "") / row["filename"]).touch()
    (folder / "dataset.json").write_text(json.dumps({"dataset": "x", "images": images}))
    return folder / "dataset.json"


@pytest.mark.parametrize("nested", [True, False])
def test_a_split_of_coco_has_cocos_ids_wherever_the_pictures_lie(folder: Path, nested: bool) -> None:
    file = written(folder, COCO, nested=nested)
    source = read_karpathy(file, folder / "images", "test")
    assert [source[i].image_id for i in range(len(source))] == [200, 100]
    assert source[0].captions == ("a dog 3", "a cat")
    assert source[0].image == folder / "images" / ("val2014" if nested else "") / "3.jpg"
    assert source.item_ids == (200, 100)


def test_splits_are_joined_for_training(folder: Path) -> None:
    source = read_karpathy(written(folder, COCO), folder / "images", "train+restval")
    assert [source[i].key for i in range(len(source))] == ["500", "400"]


def test_flickr_has_the_files_own_numbers(folder: Path) -> None:
    data = DataConfig(images=folder / "images", karpathy=written(folder, FLICKR), split="val")
    opened = data.open()
    assert [opened.source[i].image_id for i in range(len(opened.source))] == [1]
    assert data.split_name == "karpathy-val"
    assert DataConfig(images=folder, karpathy=folder, split="train+restval").split_name == "karpathy-train-restval"


def test_missing_pictures_and_captions_are_problems_and_still_asked_for(folder: Path) -> None:
    file = written(folder, [*FLICKR, image(7, "test", sentences=[{"raw": " "}])])
    (folder / "images" / "2.jpg").unlink()
    (folder / "images" / "8.jpg").touch()
    document = json.loads(file.read_text())
    document["images"].append(image(8, "test"))
    file.write_text(json.dumps(document))
    source = read_karpathy(file, folder / "images", "test")
    assert [source[i].image_id for i in range(len(source))] == [8]
    assert {problem.key: problem.reason for problem in source.problems} == {"2": "missing file", "7": "no text"}
    assert source.item_ids == (2, 7, 8)


@pytest.mark.parametrize(
    ("images", "split", "error", "message"),
    [
        (COCO, "dev", ConfigError, "has no split 'dev'; it has restval, test, train, val; several are joined as in train\\+restval"),
        ([COCO[3], COCO[3]], "test", DataError, r"images\[1\] has the id 200, which .*images\[0\] has too; expected each image once"),
        ([image(1, "test", sentences=5)], "test", DataError, "has no list 'sentences'; expected Karpathy's format"),
        ([image(1, "test", sentences=[{"tokens": []}])], "test", DataError, r"sentences\[0\] has no 'raw'"),
        ([image("1", "test")], "test", DataError, r"'imgid' is '1' \(str\); expected a whole number"),  # type: ignore[arg-type]
        ([image(1, "test", filename="../1.jpg")], "test", DataError, "expected a file name inside the images folder"),
    ],
)
def test_files_of_another_shape_are_named(folder: Path, images: list[dict[str, Any]], split: str, error: type[Exception], message: str) -> None:
    (folder / "dataset.json").write_text(json.dumps({"images": images}))
    with pytest.raises(error, match=message):
        read_karpathy(folder / "dataset.json", folder / "images", split)


SETTINGS = [
    ({"karpathy": Path("d.json")}, "karpathy holds several splits: give split, such as val or test"),
    ({"vqav2": Path("d")}, "vqav2 holds several splits: give split"),
    ({"annotations": Path("a.json"), "split": "val"}, "split would not be read: annotations gives the texts, so leave them out"),
    ({"karpathy": Path("d.json"), "split": "val", "annotations": Path("a.json")}, "annotations would not be read: karpathy gives the texts"),
    ({"image_info": Path("i.json"), "annotations": Path("a.json")}, "annotations would not be read: image_info gives the texts"),
    ({}, "the images in images come without texts"),
]


@pytest.mark.parametrize(("given", "message"), SETTINGS)
def test_settings_that_do_not_go_together_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DataConfig(images=Path("images"), **given)


def test_a_split_without_pictures_would_not_be_read() -> None:
    with pytest.raises(ConfigError, match="split would not be read: scenes holds its own texts"):
        DataConfig(scenes="val/3", split="val")


def test_official_result_files_name_the_split_as_the_data_does() -> None:
    folder = Path("x")
    names = {
        "val2014": DataConfig(images=folder, annotations=Path("captions_val2014.json")),
        "test2014": DataConfig(images=folder, image_info=Path("image_info_test2014.json")),
        "test-dev2015": DataConfig(images=folder, questions=Path("v2_OpenEnded_mscoco_test-dev2015_questions.json")),
        "val": DataConfig(images=folder, questions=Path("OpenEnded_daquar_val_questions.json"), annotations=Path("daquar_val_annotations.json")),
        "train2014-val2014": DataConfig(images=folder, vqav2=folder, split="train+val"),
    }
    assert {config.split_name for config in names.values()} == set(names)
    assert all(config.split_name == name for name, config in names.items())
    assert DataConfig(scenes="val/3").split_name == DataConfig(images=folder, annotations=Path("captions.json")).split_name == "val"
