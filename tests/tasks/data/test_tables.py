"""Tables, annotation files and imagefolders by their path alone: what is understood, what samples they give, and what is refused."""

from __future__ import annotations

import csv
import gzip
import json
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from adalink.errors import AdalinkError, DataError
from multimodal.sample import Sample
from tasks.data.sources import DataConfig

ROWS = [("a.png", "a red square"), ("b.png", 'two\nlines, "quoted"'), ("a.png", "another text"), ("c.png", "grün – 緑")]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three small images."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a.png", "b.png", "c.png"):
        Image.new("RGB", (4, 4), "red").save(folder / name)
    return folder


def as_csv(path: Path, rows: Sequence[tuple[str, str]] = ROWS, *, start: str = "", end: str = "\n", separator: str = ",") -> None:
    """A table with a line of names."""
    with path.open("w", newline="", encoding="utf-8") as file:
        file.write(start)
        writer = csv.writer(file, lineterminator=end, delimiter=separator)
        writer.writerow(["file", "caption"])
        writer.writerows(rows)


def as_lines(path: Path, rows: Sequence[tuple[str, str]] = ROWS, end: str = "\n") -> None:
    """An object a line, with an empty line among them."""
    path.write_text(end + end.join(json.dumps({"image": name, "text": text}) for name, text in rows), encoding="utf-8", newline="")


def as_list(path: Path) -> None:
    """A list of objects, in lines."""
    path.write_text(json.dumps([{"image": name, "text": text} for name, text in ROWS], indent=1, ensure_ascii=False), encoding="utf-8")


def as_coco(path: Path) -> None:
    """COCO's two lists."""
    names = list(dict.fromkeys(name for name, _ in ROWS))
    annotations = [{"id": k, "image_id": names.index(name), "caption": text} for k, (name, text) in enumerate(ROWS)]
    path.write_text(json.dumps({"images": [{"id": k, "file_name": name} for k, name in enumerate(names)], "annotations": annotations}))


def in_gzip(write: Callable[[Path], None]) -> Callable[[Path], None]:
    """The same file, packed."""

    def packed(path: Path) -> None:
        plain = path.with_suffix("")
        write(plain)
        path.write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()

    return packed


WRITERS: dict[str, Callable[[Path], None]] = {
    "t.csv": as_csv,
    "captions.txt": as_csv,
    "bom.csv": lambda path: as_csv(path, start="\ufeff"),
    "crlf.csv": lambda path: as_csv(path, end="\r\n"),
    "semicolon.csv": lambda path: as_csv(path, separator=";"),
    "t.tsv": lambda path: as_csv(path, separator="\t"),
    "t.jsonl": as_lines,
    "crlf.jsonl": lambda path: as_lines(path, end="\r\n"),
    "t.json": as_list,
    "lines.json": lambda path: path.write_text("".join(json.dumps({"image": name, "text": text}) + "\n" for name, text in ROWS)),
    "coco.json": as_coco,
    "t.csv.gz": in_gzip(as_csv),
    "t.jsonl.gz": in_gzip(as_lines),
    "t.json.gz": in_gzip(as_list),
}


def seen(sample: Sample) -> tuple[int, str, tuple[str, ...]]:
    """What does not depend on the format."""
    assert isinstance(sample.image, Path)
    return sample.image_id, sample.image.name, sample.captions


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_samples(name: str, tmp_path: Path, images: Path) -> None:
    WRITERS[name](tmp_path / name)
    opened = DataConfig(path=tmp_path / name, images=images).open()
    source = pickle.loads(pickle.dumps(opened.source))  # as a worker process gets it
    assert [seen(source[i]) for i in range(len(source))] == [
        (0, "a.png", ("a red square", "another text")), (1, "b.png", ("two\nlines, \"quoted\"",)), (2, "c.png", ("grün – 緑",)),
    ]  # fmt: skip
    assert opened.item_ids == (0, 1, 2)
    assert str(tmp_path / name) in opened.sentence


def test_an_imagefolder_is_recognised_and_its_splits_are_folders(tmp_path: Path, images: Path) -> None:
    as_lines(images / "metadata.jsonl")
    images.rename(tmp_path / "train")
    with pytest.raises(DataError, match="it is in train: give split"):
        DataConfig(path=tmp_path).open()
    assert len(DataConfig(path=tmp_path, split="train").open().source) == 3


def test_questions_with_answers_as_json_in_a_text_and_ids_of_both_kinds(tmp_path: Path, images: Path) -> None:
    lines = ["image,question,answers,question_id,image_id", 'a.png,what colour?,"[""red"", ""dark red""]",17,7.0', "b.png,how many?,2,18,9"]
    (tmp_path / "q.csv").write_text("\n".join(lines))
    opened = DataConfig(path=tmp_path / "q.csv", images=images).open()
    first, second = (opened.source[i] for i in range(2))
    assert (first.key, first.image_id, first.questions[0].question_id) == ("7", 7, 17)
    assert (first.questions[0].answers, second.questions[0].answers) == (("red", "dark red"), ("2",))
    assert opened.item_ids == (17, 18)


def test_lists_are_read_as_pandas_writes_them_into_csv(tmp_path: Path, images: Path) -> None:
    captions = [["a cat", "it's \"here\""], ["größer"]]
    answers = [[{"answer": "red", "answer_id": 1}, {"answer": "red", "answer_id": 2}], []]
    pd.DataFrame({"image": ["a.png", "b.png"], "captions": captions, "question": "what?", "answers": answers}).to_csv(tmp_path / "t.csv")
    source = DataConfig(path=tmp_path / "t.csv", images=images).open().source
    assert [list(source[i].captions) for i in range(2)] == captions
    assert [source[i].questions[0].answers for i in range(2)] == [("red", "red"), ()]


def test_rows_that_cannot_be_used_are_named_with_file_and_line(tmp_path: Path, images: Path) -> None:
    as_csv(tmp_path / "t.csv", [*ROWS, ("none.png", "not there"), ("b.png", " ")])
    problems = DataConfig(path=tmp_path / "t.csv", images=images).open().problems
    assert [(bad.reason, bad.detail) for bad in problems] == [
        ("missing file", f"t.csv, line 7: {images / 'none.png'} is missing"),
        ("empty caption", "t.csv, line 8: the caption in 'caption' is empty"),
    ]


@pytest.mark.parametrize(
    "name, text, fields, message",
    [("t.jsonl", '{"image": "a.png", "text": "x"}\n{"image": ', {}, r"t.jsonl, line 2: .* is not JSON"),
     ("t.jsonl", '{"image": "a.png", "text": "x"}\n3\n', {}, r"t.jsonl, line 2 is b'3'; expected an object"),
     ("t.json", '[{"image": "a.png", "text": "x"}, {"im', {}, "is not JSON at row 1, line 1"),
     ("t.csv", "image,text\na.png,x,y\n", {}, "line 2 has 3 fields, and the line of names has 2"),
     ("t.csv", "image,text,text\n", {}, "the column 'text' more than once"),
     ("t.csv", "image,text\n", {}, "holds no row"),
     ("t.csv", "image,caption,text\na.png,x,y\n", {}, r"columns 'caption' and 'text', and either may be the caption: choose, as in columns: {caption: caption}"),
     ("t.csv", "image,text\na.png,x\n", {"columns": {"caption": "txt"}}, r"no column 'txt'; the nearest is 'text'; it has 'image', 'text'"),
     ("t.csv", "image,text\na.png,x\n", {"columns": {"titel": "text"}}, "the role 'titel': expected some of image, caption"),
     ("t.csv", "title,words\na,x\n", {}, "no column that is known to hold images; it has 'title', 'words'"),
     ("t.csv", "image,text\n../a.png,x\n", {}, "names the image '../a.png'; expected a file name inside the images folder"),
     ("t.csv", "image,text\nsub\\a.png,x\n", {}, r"inside the images folder .*; write / between folders, not "),
     ("t.csv", "image,text\na.png,x\n", {"format": "tabel"}, "no format 'tabel'; the nearest is table"),
     ("t.csv", "image,text\nd.png,x\n", {}, "1 sample cannot be used, the first because t.csv, line 2: .* is missing: give images, the folder of images"),
     ("t.csv", "image,captions\na.png,\"['x' 'y']\"\n", {}, r"line 2: the caption is \['x' 'y'\] in one text, and no list that can be read; write lists as JSON"),
     ("t.csv", "image,text\na.png,x\n", {"split": "train"}, "is read as a CSV, .* table, and split would not be read: leave it out; give each split as a path"),
     ("t.csv", "image,text\na.png,x\n", {"image_name": "{image_id}.png", "annotations": Path("a")}, "annotations, image_name would not be read"),
     ("t.json", '{"image": "a.png", "text": "x"}\n{"image": ', {}, r"t.json, line 2: .* is not JSON"),
     ("c.json", '{"images": [{"id": 1}], "annotations": [{"bbox": []}]}', {}, r"and no caption in the first annotation; is it the file of captions\?"),
     ("t.xml", "<a/>", {}, r"of no format that is known \(a file that ends in '.xml'\)")],
)  # fmt: skip
def test_wrong_files_are_refused_in_one_sentence(
    name: str, text: str, fields: dict[str, object], message: str, tmp_path: Path, images: Path
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(AdalinkError, match=message):
        DataConfig(path=tmp_path / name, images=images, **fields).open()  # type: ignore[arg-type]


def test_a_table_without_texts_and_a_folder_of_images_alone_say_what_is_missing(tmp_path: Path, images: Path) -> None:
    (tmp_path / "t.csv").write_text("filepath,title\na.png,a cat\n")
    sentence = DataConfig(path=tmp_path / "t.csv", images=images).open().sentence
    assert "no column is known to hold captions or questions; it has 'filepath', 'title'; name it, as in columns: {caption: title}" in sentence
    with pytest.raises(DataError, match=r"it holds images without texts; expected a text file beside each, such as cat.txt of cat.jpg"):
        DataConfig(path=images).open()


def test_whole_paths_into_a_folder_that_is_given_from_the_current_one(tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_csv(tmp_path / "t.csv", [(str(images / name), text) for name, text in ROWS])
    monkeypatch.chdir(tmp_path)
    for given in (Path("images"), Path("images/../images"), Path(), None):
        source = DataConfig(path="t.csv", images=given).open().source
        assert [len(source[i].captions) for i in range(len(source))] == [2, 1, 1]


def test_hidden_files_of_macos_are_no_samples(images: Path) -> None:
    for name in ("a.txt", "._a.txt", "._a.png"):
        (images / name).write_text("a text")
    opened = DataConfig(path=images).open()
    assert [bad.key for bad in opened.problems] == ["b", "c"]


def test_a_folder_that_may_be_two_things_names_both_and_the_key_that_decides(images: Path) -> None:
    as_lines(images / "metadata.jsonl")
    (images / "a.txt").write_text("a text")
    with pytest.raises(DataError, match="choose with format, imagefolder or caption_folder"):
        DataConfig(path=images).open()
    assert len(DataConfig(path=images, format="imagefolder").open().source) == 3


def test_tables_of_pandas_with_gaps_are_read(tmp_path: Path, images: Path) -> None:
    frame = pd.DataFrame({"image": ["a.png", "b.png", "c.png"], "text": ["a cat", None, "größer"], "image_id": [3, 4, None], "note": [1.5, None, 2]})
    frame.to_csv(tmp_path / "t.csv", index=False)
    frame.to_json(tmp_path / "t.jsonl", orient="records", lines=True, force_ascii=False)
    frame.to_csv(tmp_path / "indexed.csv.gz")  # with pandas' own column of numbers, which has no name
    for name in ("t.csv", "t.jsonl", "indexed.csv.gz"):
        opened = DataConfig(path=tmp_path / name, images=images).open()
        assert [seen(opened.source[i]) for i in range(len(opened.source))] == [(0, "a.png", ("a cat",)), (2, "c.png", ("größer",))]
        assert [bad.reason for bad in opened.problems] in (["empty caption"], ["no text"])
