from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from shared import shared

from adalink.errors import ConfigError, DataError
from multimodal.data.images.decode import decode_image
from multimodal.sample import SampleSource
from tasks.data.coco import read_coco_captions, read_coco_images

DOCUMENT: dict[str, Any] = {
    "images": [{"id": 7, "file_name": "b.jpg"}, {"id": 3, "file_name": "train/a.jpg"}],
    "annotations": [
        {"id": 1, "image_id": 3, "caption": "A cat."},
        {"id": 2, "image_id": 7, "caption": " A dog.\n"},
        {"id": 3, "image_id": 3, "caption": "Cat!"},
    ],
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "images" / "train").mkdir(parents=True)
    (tmp_path / "images" / "b.jpg").write_bytes(b"b")
    (tmp_path / "images" / "train" / "a.jpg").write_bytes(b"a")
    return tmp_path


def written(root: Path, document: object) -> Path:
    path = root / "captions.json"
    path.write_text(json.dumps(document))
    return path


def changed(**lists: object) -> dict[str, object]:
    return DOCUMENT | lists


def test_one_sample_per_image_has_all_its_captions_in_the_files_order(root: Path) -> None:
    source: SampleSource = read_coco_captions(images=root / "images", annotations=written(root, DOCUMENT))
    assert [source[i].image_id for i in range(len(source))] == [7, 3]
    assert source[0].captions == ("A dog.",)
    assert source[1].captions == ("A cat.", "Cat!")
    assert source[1].key == "3"
    assert source[1].image == root / "images" / "train" / "a.jpg"


@pytest.mark.parametrize(
    "pattern", ["COCO_val2014_{image_id:012d}.jpg", "image{image_id}.jpg", "{image_id:012d}.jpg", "sub/{image_id}.jpg"]
)
def test_a_pattern_names_the_pictures_in_place_of_the_file(root: Path, pattern: str) -> None:
    (root / "images" / "sub").mkdir()
    for image_id in (3, 7):
        (root / "images" / pattern.format(image_id=image_id)).touch()
    document = changed(images=[{"id": 7}, {"id": 3, "file_name": "elsewhere.jpg"}])
    source = read_coco_captions(images=root / "images", annotations=written(root, document), image_name=pattern)
    assert source.problems == ()
    assert source[1].image == root / "images" / pattern.format(image_id=3)


def test_absent_pictures_and_images_without_captions_are_counted_and_the_rest_stays(root: Path) -> None:
    images = [*DOCUMENT["images"], {"id": 9, "file_name": "c.jpg"}, {"id": 10, "file_name": "b.jpg"}, {"id": 11, "file_name": "no/d.jpg"}]
    captions = [*DOCUMENT["annotations"], {"image_id": 10, "caption": " \n"}, {"image_id": 9, "caption": "Lost."}]
    source = read_coco_captions(images=root / "images", annotations=written(root, changed(images=images, annotations=captions)))
    assert len(source) == 2
    assert [(bad.key, bad.reason) for bad in source.problems] == [
        ("10", "empty caption"),
        ("9", "missing file"),
        ("10", "no text"),
        ("11", "missing file"),
    ]
    assert [bad.detail for bad in source.problems] == [
        f"{root / 'captions.json'}: annotations[3] of image 10 (b.jpg) is empty",
        f"{root / 'images' / 'c.jpg'} is missing",
        "image 10 (b.jpg) has no caption",
        f"{root / 'images' / 'no' / 'd.jpg'} is missing",
    ]


def test_pictures_are_looked_up_in_one_listing_and_not_one_by_one(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [*DOCUMENT["images"], *({"id": n, "file_name": f"{n}.jpg"} for n in range(100, 150))]
    path = written(root, changed(images=images))
    asked: list[object] = []
    real = os.stat
    monkeypatch.setattr(os, "stat", lambda path, **options: asked.append(path) or real(path, **options))
    source = read_coco_captions(images=root / "images", annotations=path)
    assert len(source.problems) == 50
    assert 1 <= len(asked) < 5  # the folder itself


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([1], r"holds \[1\] \(list\); expected a JSON object with the lists 'images', 'annotations'"),
        ({"questions": [], "info": {}}, "has no list 'images'; it has 'questions', 'info'; is it the right file"),
        ({}, "has no list 'images'; it has nothing"),
        ({"images": []}, "has no list 'annotations'; it has 'images'"),
        (changed(images={"7": "b.jpg"}), r"'images' is \{'7': 'b.jpg'\} \(dict\); expected a list"),
        (changed(images=[7]), r"images\[0\] is 7 \(int\); expected an object with named fields"),
        (changed(images=[{"file_name": "b.jpg"}]), r"images\[0\] has no 'id'; it has 'file_name'"),
        (changed(images=[{"id": "7", "file_name": "b.jpg"}]), r"images\[0\]: 'id' is '7' \(str\); expected a whole number"),
        (changed(images=[{"id": True, "file_name": "b.jpg"}]), r"images\[0\]: 'id' is True \(bool\); expected a whole number"),
        (
            changed(images=[{"id": 7}]),
            r"images\[0\] has no 'file_name'; give an image name pattern, such as COCO_val2014_\{image_id:012d\}.jpg",
        ),
        (changed(images=[{"id": 7, "file_name": 7}]), r"images\[0\]: 'file_name' is 7 \(int\); expected a text"),
        (changed(images=DOCUMENT["images"] * 2), r"images\[2\] has the id 7, which .*images\[0\] has too; expected each image once"),
        (
            changed(annotations=[{"image_id": 8, "caption": "x"}]),
            r"annotations\[0\] belongs to image 8, which the list 'images' of .* does not have",
        ),
        (changed(annotations=[{"image_id": 7, "category_id": 1}]), r"annotations\[0\] has no 'caption'; it has 'image_id', 'category_id'"),
        (changed(annotations=[{"image_id": 7, "caption": None}]), r"annotations\[0\]: 'caption' is None \(NoneType\); expected a text"),
        (changed(annotations=[{"image_id": 7, "caption": "a \ud83d"}]), r"'caption' is 'a .*half of a surrogate pair; expected Unicode text"),
        (changed(images=[], annotations=[]), "captions.json gives no sample$"),
        (changed(annotations=[]), r"gives no sample; 2 samples cannot be used, the first because image 7 \(b.jpg\) has no caption"),
    ],
)
def test_a_file_of_another_shape_says_what_was_found_and_expected(root: Path, document: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_coco_captions(images=root / "images", annotations=written(root, document))


@pytest.mark.parametrize("name", ["../secret.jpg", "/etc/passwd", "a/../../b.jpg", "a\0.jpg", "", "..\\b.jpg"])
def test_a_file_name_cannot_leave_the_folder(root: Path, name: str) -> None:
    path = written(root, changed(images=[{"id": 7, "file_name": name}], annotations=[]))
    with pytest.raises(DataError, match=r"images\[0\] names the image .*; expected a file name inside the images folder"):
        read_coco_captions(images=root / "images", annotations=path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b'{"images": [', "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"PK\x03\x04", "is it whole, and unpacked"),
    ],
)
def test_a_file_that_is_not_json_says_so(root: Path, content: bytes, message: str) -> None:
    path = root / "captions.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_coco_captions(images=root / "images", annotations=path)


def test_missing_files_and_folders_say_so(root: Path) -> None:
    path = written(root, DOCUMENT)
    with pytest.raises(DataError, match=r"annotation file .*absent.json does not exist; check the path"):
        read_coco_captions(images=root / "images", annotations=root / "absent.json")
    with pytest.raises(DataError, match=r"annotation file .*images cannot be read: Is a directory"):
        read_coco_captions(images=root / "images", annotations=root / "images")
    with pytest.raises(DataError, match=r"images folder .*absent does not exist; expected a folder of images"):
        read_coco_captions(images=root / "absent", annotations=path)
    with pytest.raises(DataError, match=r"images folder .*captions.json is a file; expected a folder of images"):
        read_coco_captions(images=path, annotations=path)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{id}.jpg", "unknown field 'id'; the only field is image_id"),
        ("{image_id.real}.jpg", "unknown field 'image_id.real'"),
        ("{}.jpg", "unknown field ''"),
        ("{image_id}_{split}.jpg", "unknown field 'split'"),
        ("image.jpg", "has no field, so all images would have one name"),
        ("{image_id.jpg", "cannot be used: expected '}'"),
        ("{image_id:q}.jpg", "cannot be used: Unknown format code 'q'"),
        ("{image_id:{width}}.jpg", "cannot be used: 'width'"),
    ],
)
def test_a_wrong_pattern_says_what_is_wrong(root: Path, pattern: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_coco_captions(images=root / "images", annotations=written(root, DOCUMENT), image_name=pattern)


def test_a_test_split_has_images_alone(root: Path) -> None:
    path = written(root, {"images": [*DOCUMENT["images"], {"id": 4, "file_name": "gone.jpg"}]})
    source = read_coco_images(images=root / "images", annotations=path)
    assert [(source[i].image_id, source[i].captions) for i in range(len(source))] == [(7, ()), (3, ())]
    assert [(bad.key, bad.reason) for bad in source.problems] == [("4", "missing file")]


def test_a_source_pickles_and_ends(root: Path) -> None:
    source = read_coco_captions(images=root / "images", annotations=written(root, DOCUMENT))
    copy = pickle.loads(pickle.dumps(source))
    assert [copy[i] for i in range(len(copy))] == [source[i] for i in range(len(source))]
    with pytest.raises(IndexError):
        source[2]


def test_real_captions_are_all_read_and_their_pictures_decode() -> None:
    folder = shared("data/coco_mini")
    source = read_coco_captions(images=folder / "val2017", annotations=folder / "annotations/captions_val2017.json")
    assert (len(source), sum(len(source[i].captions) for i in range(len(source)))) == (283, 1416)
    named = read_coco_captions(
        images=folder / "val2017", annotations=folder / "annotations/captions_val2017.json", image_name="{image_id:012d}.jpg"
    )
    assert [named[i] for i in range(283)] == [source[i] for i in range(283)]
    assert source.problems == named.problems == ()
    assert decode_image(source[0].image).mode == "RGB"
