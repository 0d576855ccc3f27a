from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from made_shards import as_first_form, everything, flip, image, made_shards, tar_of
from shared import shared

from adalink.errors import BudgetError, ConfigError, DataError
from multimodal.data.shards.reader import ShardSource
from multimodal.data.shards.writer import write_shards
from multimodal.sample import DamagedSample, Question, Sample
from tasks.cli import main
from tasks.commands.shards import shards_check, shards_from, shards_img2dataset
from tasks.data.coco import read_coco_captions
from tasks.data.sources import DataConfig
from tasks.data.vqa import read_vqa


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three images, one of them absent, in COCO's and in VQAv2's format."""
    (tmp_path / "images").mkdir()
    for number in (1, 2):
        (tmp_path / "images" / f"image{number}.jpg").write_bytes(image(number))
    images = [{"id": number, "file_name": f"image{number}.jpg"} for number in (1, 2, 3)]
    captions = [{"image_id": number, "caption": f"caption of {number}"} for number in (1, 2, 3)]
    questions = [{"question_id": number * 10, "image_id": number, "question": "What?"} for number in (1, 2, 3)]
    answers = [{"question_id": number * 10, "image_id": number, "answers": [{"answer": "yes"}]} for number in (1, 2, 3)]
    (tmp_path / "captions.json").write_text(json.dumps({"images": images, "annotations": captions}))
    (tmp_path / "questions.json").write_text(json.dumps({"questions": questions}))
    (tmp_path / "answers.json").write_text(json.dumps({"annotations": answers}))
    return tmp_path


def test_coco_captions_become_shards_and_what_is_missing_is_counted(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = shards_from(DataConfig(path=root / "captions.json", images=root / "images"), out=root / "out", bad_samples=1)
    assert [(sample.image_id, sample.captions) for sample in everything(ShardSource(root / "out"))] == [
        (1, ("caption of 1",)),
        (2, ("caption of 2",)),
    ]
    assert [(bad.key, bad.reason) for bad in manifest.skipped] == [("3", "missing file")]
    printed = capsys.readouterr().out
    read, _, wrote = printed.partition("\n")
    assert read == f"{root / 'captions.json'} is read as COCO captions (2 images)"
    assert wrote == f"wrote 1 shard with 2 images (0.0 MiB) in {root / 'out'}\nskipped: 1 missing file (3 image3.jpg)\n"


def test_questions_become_shards_with_and_without_answers(root: Path) -> None:
    test = DataConfig(path=root / "questions.json", images=root / "images", image_name="image{image_id}.jpg")
    shards_from(replace(test, annotations=root / "answers.json"), out=root / "val", samples_per_shard=1, bad_samples=1)
    shards_from(test, out=root / "test", bad_samples=1)
    assert [sample.questions[0].answers for sample in everything(ShardSource(root / "val"))] == [("yes",), ("yes",)]
    assert [sample.questions[0].answers for sample in everything(ShardSource(root / "test"))] == [(), ()]


def test_a_missing_picture_stops_the_command_unless_it_is_allowed(root: Path) -> None:
    with pytest.raises(BudgetError, match=r"1 bad sample, and at most 0 are allowed: 1 missing file \(3 image3.jpg\)"):
        shards_from(DataConfig(path=root / "captions.json", images=root / "images"), out=root / "out")
    assert not (root / "out").exists()


def test_a_folder_of_pictures_and_texts_becomes_shards(tmp_path: Path) -> None:
    (tmp_path / "in" / "b").mkdir(parents=True)
    (tmp_path / "in" / "b" / "x.JPG").write_bytes(image(1))
    (tmp_path / "in" / "b" / "x.txt").write_text("one\n\n two \n")
    (tmp_path / "in" / "a.webp").write_bytes(image(2, "WEBP"))
    (tmp_path / "in" / "a.txt").write_text("\ufeffthree\n")
    (tmp_path / "in" / "alone.png").write_bytes(image(3, "PNG"))
    (tmp_path / "in" / "lost.txt").write_text("four")
    (tmp_path / "in" / "readme.md").touch()
    manifest = shards_from(DataConfig(path=tmp_path / "in", format="caption_folder"), out=tmp_path / "out", bad_samples=2)
    assert [(bad.key, bad.reason) for bad in manifest.skipped] == [("alone", "no text"), ("lost", "missing file")]
    found = everything(ShardSource(tmp_path / "out"))
    assert [(sample.key, sample.image_id, sample.captions) for sample in found] == [("a", 0, ("three",)), ("b/x", 2, ("one", "two"))]


@pytest.mark.parametrize("boundary", ["\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"])
def test_what_unicode_calls_a_line_boundary_does_not_end_a_caption(tmp_path: Path, boundary: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(image(1))
    (tmp_path / "in" / "a.txt").write_bytes(f"one{boundary}line\ntwo\r\nthree\rfour".encode())
    shards_from(DataConfig(path=tmp_path / "in", format="caption_folder"), out=tmp_path / "out")
    assert everything(ShardSource(tmp_path / "out"))[0].captions == (f"one{boundary}line", "two", "three", "four")


@pytest.mark.parametrize("ending", ["JPG", "JPEG", "Jpg", "PNG", "WEBP", "Webp"])
def test_endings_in_capital_letters_are_endings(tmp_path: Path, ending: str) -> None:
    kind = {"jpg": "JPEG", "jpeg": "JPEG"}.get(ending.lower(), ending.upper())
    for name, text in (("a", "a.TXT"), ("b.2", "b.2.txt")):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{name}.{ending}").write_bytes(image(1, kind))
        (tmp_path / "in" / text).write_text("one")
    shards_from(DataConfig(path=tmp_path / "in", format="caption_folder"), out=tmp_path / "out")
    assert [(sample.key, sample.captions) for sample in everything(ShardSource(tmp_path / "out"))] == [("a", ("one",)), ("b.2", ("one",))]
    tar_of(tmp_path / "foreign.tar", [(f"a.{ending}", image(1, kind)), ("a.TXT", b"one")])
    assert [sample.captions for sample in everything(ShardSource([tmp_path / "foreign.tar"]))] == [("one",)]


def test_a_folder_that_cannot_be_read_as_captions_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent does not exist: check the path of the data set"):
        shards_from(DataConfig(path=tmp_path / "absent", format="caption_folder"), out=tmp_path / "out")
    with pytest.raises(DataError, match="gives no sample"):
        shards_from(DataConfig(path=tmp_path, format="caption_folder"), out=tmp_path / "out")
    (tmp_path / "a.jpg").touch()
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(
        DataError, match=r"gives no sample; 1 sample cannot be used, .* the captions .*a.txt cannot be read: .*; expected UTF-8 text"
    ):
        shards_from(DataConfig(path=tmp_path, format="caption_folder"), out=tmp_path / "out")
    (tmp_path / "a.png").touch()
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataError, match=r"the images 'a.jpg' and 'a.png' in .* have one key, 'a'; rename one of them"):
        shards_from(DataConfig(path=tmp_path, format="caption_folder"), out=tmp_path / "out")


def test_foreign_shards_are_indexed_once_and_then_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = [("0.jpg", image(0)), ("0.txt", b"zero"), ("0.cls", b"5"), ("1.jpg", image(1)), ("1.txt", b"one"), ("2.txt", b"two")]
    tar_of(tmp_path / "00000.tar", members)
    with pytest.raises(BudgetError, match=r"1 no image \(2\)"):
        shards_img2dataset(shards=tmp_path)
    assert os.listdir(tmp_path) == ["00000.tar"]
    shards_img2dataset(shards=tmp_path, bad_samples=1)
    assert "indexed 1 shard with 2 images" in (printed := capsys.readouterr().out)
    assert "skipped: 1 no image (2)\nmembers that no sample uses: 1 .cls\n" in printed
    shards_check(shards=tmp_path)
    source = ShardSource(tmp_path)
    assert ([sample.captions for sample in everything(source)], source.problems) == ([("zero",), ("one",)], ())
    with pytest.raises(ConfigError, match=r"manifest.json is there already; run `adalink shards check`, or delete it"):
        shards_img2dataset(shards=tmp_path)
    flip(tmp_path / "00000.tar", 600)
    with pytest.raises(DataError, match=r"1 thing is wrong with the shards in .*: .*00000.tar has 1 damaged samples: '0'"):
        shards_check(shards=tmp_path)


def test_foreign_shards_without_a_sample_are_not_indexed(tmp_path: Path) -> None:
    tar_of(tmp_path / "a.tar", [("a.cls", b"1")])
    with pytest.raises(DataError, match=r"hold no sample: none has an image and a text"):
        shards_img2dataset(shards=tmp_path)
    assert os.listdir(tmp_path) == ["a.tar"]


def test_foreign_names_with_dots_are_told_by_one_that_has_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dotted = [(f"trip.2014.{n}.{suffix}", data) for n in (1, 2) for suffix, data in (("JPG", image(n)), ("txt", b"a square"))]
    path = tar_of(tmp_path / "a.tar", dotted)
    why = r"'trip.2014.1.JPG' of .*a.tar is the member '2014.1.jpg' of a sample 'trip', since a key ends at the first dot, as in webdataset"
    for read in (lambda: shards_img2dataset(shards=tmp_path), lambda: ShardSource(tmp_path)):
        with pytest.raises(DataError, match=f"hold no sample.*{why}: write names without dots, such as trip_2014_1.JPG"):
            read()
    # Beside samples that can be read they are samples that cannot, and further members of a sample are none.
    others = [("b.jpg", image(3)), ("b.txt", b"three"), ("b.seg.png", b"4"), ("c.seg.png", b"5"), ("c.json", b"{}")]
    tar_of(path, [*dotted, *others])
    with pytest.raises(BudgetError, match=r"2 dots in the name \(trip.2014.1, trip.2014.2\), 1 no image \(c\)"):
        shards_img2dataset(shards=tmp_path)
    shards_img2dataset(shards=tmp_path, bad_samples=3)
    assert "members that no sample uses: 2 .seg.png\n" in capsys.readouterr().out


def test_a_check_names_the_first_faults_and_counts_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made_shards(tmp_path, count=12, samples_per_shard=1)
    shards_check(shards=tmp_path)
    assert capsys.readouterr().out == f"the shards in {tmp_path} are what their manifest says\n"
    for path in tmp_path.glob("*.tar"):
        path.unlink()
    with pytest.raises(DataError, match=r"12 things are wrong with the shards in .*shard-000009.tar cannot be read: .*; and 2 more"):
        shards_check(shards=tmp_path)


def test_a_set_of_the_first_form_is_upgraded_and_one_of_a_newer_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made_shards(tmp_path)
    samples, fingerprint = everything(ShardSource(tmp_path)), ShardSource(tmp_path).fingerprint
    as_first_form(tmp_path)
    (tmp_path / "shard-000001.tar").rename(tmp_path / "away")
    assert main(["shards", "check", "--shards", str(tmp_path)]) == 2
    (tmp_path / "away").rename(tmp_path / "shard-000001.tar")
    capsys.readouterr()
    for written in ("3 indexes", "0 indexes"):
        assert main(["shards", "check", "--shards", str(tmp_path), "--upgrade", "true"]) == 0
        assert capsys.readouterr().out == f"wrote {written} in {tmp_path}\nthe shards in {tmp_path} are what their manifest says\n"
    assert (everything(ShardSource(tmp_path)), ShardSource(tmp_path).fingerprint) == (samples, fingerprint)
    (tmp_path / "shard-000001.idx").unlink()
    assert main(["shards", "check", "--shards", str(tmp_path)]) == 2
    assert "shard-000001.idx cannot be opened: No such file or directory; fetch it again, or run `adalink shards check --upgrade true`" in capsys.readouterr().err
    assert main(["shards", "check", "--shards", str(tmp_path), "--upgrade", "true"]) == 0
    manifest = tmp_path / "manifest.json"
    manifest.write_text(manifest.read_text().replace("adalink shards 2", "adalink shards 3"))
    assert main(["shards", "check", "--shards", str(tmp_path), "--upgrade", "true"]) == 2
    assert "is of a newer version: its format is 'adalink shards 3'" in capsys.readouterr().err


def test_real_captions_and_questions_survive_the_way_through_shards(tmp_path: Path) -> None:
    coco, daquar = shared("data/coco_mini"), shared("data/daquar")
    captions = {"images": coco / "val2017", "annotations": coco / "annotations/captions_val2017.json"}
    shards_from(DataConfig(path=captions["annotations"], images=captions["images"]), out=tmp_path / "coco", samples_per_shard=100, workers=2)
    questions = {
        "images": daquar / "images",
        "questions": daquar / "annotations/OpenEnded_daquar_val_questions.json",
        "annotations": daquar / "annotations/daquar_val_annotations.json",
        "image_name": "image{image_id}.jpg",
    }
    shards_from(DataConfig(path=questions["questions"], **{name: questions[name] for name in ("images", "annotations", "image_name")}), out=tmp_path / "vqa")
    for folder, files in (("coco", read_coco_captions(**captions)), ("vqa", read_vqa(**questions))):
        found = ShardSource(tmp_path / folder)
        assert len(found) == len(files)
        for index in range(len(files)):
            one, other = found[index], files[index]
            assert isinstance(other.image, Path)
            assert one.image == other.image.read_bytes()
            assert (one.key, one.image_id, one.captions, one.questions) == (other.key, other.image_id, other.captions, other.questions)


def test_samples_of_several_images_and_turns_survive_shards(tmp_path: Path) -> None:
    images = [image(number) for number in range(3)]
    asked = Question(question_id=3, text="and now?", answers=("two",), turns=(("user", "how many?"), ("assistant", "one")))
    samples = [Sample(key="a", image_id=0, image=images[0], further=tuple(images[1:]), questions=(asked,)), Sample(key="b", image_id=1, image=images[2])]
    write_shards(samples, tmp_path / "out")  # type: ignore[arg-type]
    assert everything(ShardSource(tmp_path / "out")) == samples
    shards_check(shards=tmp_path / "out")
    found = (tmp_path / "out" / "shard-000000.tar").read_bytes().index(images[1])
    flip(tmp_path / "out" / "shard-000000.tar", found + 4)
    with pytest.raises(DamagedSample, match=f"an image from byte {found} on is not what was written"):
        ShardSource(tmp_path / "out")[0]


def test_the_old_names_of_commands_go_on_for_one_version(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--images", str(root / "images"), f"--annotations={root / 'captions.json'}", "--out", str(root / "out"), "--bad-samples", "1"]
    assert main(["shards", "coco", *arguments]) == 0
    assert "`shards coco` is now `shards from PATH`" in capsys.readouterr().err
    assert len(ShardSource(root / "out")) == 2
