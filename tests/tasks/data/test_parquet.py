"""Parquet and Arrow files as data sets: what other libraries write, splits, unpacked copies, and what is refused."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet as pq

from adalink.errors import AdalinkError, ConfigError, DataError
from multimodal.data.order import Mixture
from multimodal.sample import DamagedSample, Sample
from tasks.data import parquet
from tasks.data.arrow import rows as arrow_rows
from tasks.data.arrow.rows import ArrowRows
from tasks.data.columns import choose_columns
from tasks.data.parquet import hub_files
from tasks.data.reader import Given
from tasks.data.sources import DataConfig
from tasks.data.table import Scan, TableSource

COLOURS = ("red", "green", "blue", "white", "black")
ANSWERS = [{"answer": answer, "answer_confidence": "yes", "answer_id": k} for k, answer in enumerate(("2", "two"), start=1)]


def png(colour: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(out, "PNG")
    return out.getvalue()


def with_images(n: int = 5) -> dict[str, list[Any]]:
    """Columns: an image as a struct, and two captions each."""
    return {
        "image": [{"bytes": png(colour), "path": f"{colour}.png"} for colour in COLOURS[:n]],
        "caption": [[f"a {colour} image", f"grün – {colour}"] for colour in COLOURS[:n]],
    }


def write(path: Path, columns: Mapping[str, Any], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(dict(columns)), path, **options)
    return path


def opened(path: Path, **fields: Any) -> list[Sample]:
    """All samples, as a worker process gets them."""
    source = pickle.loads(pickle.dumps(DataConfig(path=path, **fields).open().source))
    return [source[i] for i in range(len(source))]


def check_samples(samples: list[Sample]) -> None:
    assert [sample.image for sample in samples] == [png(colour) for colour in COLOURS]
    assert [sample.captions for sample in samples] == [tuple(texts) for texts in with_images()["caption"]]
    assert [sample.image_id for sample in samples] == [0, 1, 2, 3, 4]
    assert len({sample.key for sample in samples}) == 5


def test_what_datasets_writes(tmp_path: Path) -> None:
    """Its parquet, and its folders on disk, of one split and of two."""
    import datasets

    features = datasets.Features({"image": datasets.Image(), "caption": datasets.List(datasets.Value("string"))})
    made = datasets.Dataset.from_dict(with_images(), features=features)
    made.to_parquet(tmp_path / "one.parquet")
    made.save_to_disk(tmp_path / "disk", num_shards=2)
    datasets.DatasetDict({"train": made, "val": made.select([0])}).save_to_disk(tmp_path / "splits")
    for path, fields in (("one.parquet", {}), ("disk", {}), ("splits", {"split": "train"})):
        check_samples(opened(tmp_path / path, **fields))
    assert len(opened(tmp_path / "splits", split="val")) == 1
    with pytest.raises(ConfigError, match="disk has no split 'test'; it has files whose names say no split, so leave split out"):
        opened(tmp_path / "disk", split="test")
    # What `load_dataset` makes of a name; here of a folder, because no hub is reached.
    folder = write(tmp_path / "hub" / "train-00000-of-00001.parquet", with_images()).parent
    files = hub_files(str(folder), tmp_path / "cache")
    assert [len(ArrowRows(tmp_path, found)) for found in files.values()] == [5]


def test_what_pandas_writes(tmp_path: Path) -> None:
    """Bytes without a struct, in a column of another name; feather's batches are compressed."""
    table = pd.DataFrame({"photo": [png(colour) for colour in COLOURS], "text": [f"a {colour} image" for colour in COLOURS]})
    table.to_parquet(tmp_path / "t.parquet")
    table.to_feather(tmp_path / "t.feather")
    for name in ("t.parquet", "t.feather"):
        samples = opened(tmp_path / name)
        assert [(sample.image, sample.captions) for sample in samples] == [(png(colour), (f"a {colour} image",)) for colour in COLOURS]


def test_questions_as_vqav2_has_them_in_a_table(tmp_path: Path) -> None:
    columns = {"question_id": [17, 18], "image_id": [7, 7], "question": ["how many?", "where?"], "answers": [ANSWERS, ANSWERS[:1]]}
    path = write(tmp_path / "q.parquet", {**columns, "image": with_images(2)["image"]})
    first, second = opened(path)
    assert (first.image_id, first.questions[0].question_id, first.questions[0].answers) == (7, 17, ("2", "two"))
    assert (second.image_id, second.questions[0].question_id, second.questions[0].text) == (7, 18, "where?")


def test_several_images_in_a_row(tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", {"images": [with_images(3)["image"]], "text": ["three images"]})
    (sample,) = opened(path)
    assert (sample.image, sample.further) == (png("red"), (png("green"), png("blue")))


def test_names_of_images_are_rows_about_one_image(tmp_path: Path) -> None:
    for colour in COLOURS[:2]:
        (tmp_path / f"{colour}.png").write_bytes(png(colour))
    columns = {"file_name": ["red.png", "green.png", "red.png", "none.png"], "text": ["one", "two", "three", "four"]}
    found = DataConfig(path=write(tmp_path / "t.parquet", columns)).open()
    assert [found.source[i].captions for i in range(2)] == [("one", "three"), ("two",)]
    assert [bad.detail for bad in found.problems] == [f"t.parquet, row 3: {tmp_path / 'none.png'} is missing"]
    (tmp_path / "t.parquet").rename(tmp_path / "metadata.parquet")
    assert len(DataConfig(path=tmp_path).open().source) == 2  # an imagefolder


NAMES = ["red.png", "b/blue.png", None, "none.png", "", "red.png", "b//blue.png", "./red.png", "none.png", "b/blue.png"]
TEXTS = ["one", " two ", "x", None, "x", "", '["three", "four"]', "grün", "x", "\u3000"]
LISTS = [["a", "b"], ["c"], ["x"], None, [], [""], ["d", ""], ["e"], [" "], ["f", None]]


@pytest.mark.parametrize(
    "columns",
    [{"caption": TEXTS}, {"captions": LISTS}, {"question": TEXTS, "answers": LISTS}, {"question": TEXTS, "caption": [None, *TEXTS[1:]][::-1]}, {},
     {"caption": ["x"] * 10, "image_id": [1, 2, 9, 3, 4, 1, 5, 6, 3, 2]}, {"caption": ["x"] * 10, "image_id": [1, 2, 9, 3, 4, 7, 5, 6, 3, 2]},
     {"caption": ["x"] * 10, "image_id": [*"129341", "5.0", "6", "3", "2"]}, {"caption": ["x"] * 10, "image_id": [*"a29341567", None]},
     {"question": ["x"] * 10, "question_id": list(range(5, 15))}, {"question": ["x"] * 10, "question_id": [1] * 10}, {"caption": ["x"] * 10, "image": ["[]", *NAMES[1:]]}],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["text", "struct"])
def test_columns_at_once_give_what_rows_one_by_one_give(columns: dict[str, Any], kind: str, tmp_path: Path) -> None:
    for name in ("red.png", "b/blue.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    names = columns.get("image", NAMES)
    images = names if kind == "text" else pa.array([{"bytes": None, "path": name} for name in names], pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    path = write(tmp_path / "t.parquet", {**columns, "image": images}, row_group_size=4)
    rows = ArrowRows(path, [path])
    reading = choose_columns(rows, {})
    found = [TableSource(rows, reading, images=tmp_path, scan=scan) for scan in (parquet.ColumnScan, Scan)]
    assert [one.item_ids for one in found[:1]] == [one.item_ids for one in found[1:]]
    assert found[0].problems == found[1].problems
    first, second = ([one[i] for i in range(len(one))] for one in found)
    assert first == second
    assert first


def test_splits_are_in_the_names_of_files_as_on_the_hub(tmp_path: Path) -> None:
    columns = with_images(1)
    for name in ("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/validation-00000-of-00001-0a1b.parquet"):
        write(tmp_path / "a" / name, columns)
    for name in ("train/0000.parquet", "test/0000.parquet", "test/0001.parquet"):
        write(tmp_path / "b" / name, columns)
    assert [sample.key for sample in opened(tmp_path / "a", split="train")] == ["train-00000-of-00002:0", "train-00001-of-00002:0"]
    assert len(opened(tmp_path / "a", split="val+train")) == 3
    assert [sample.key for sample in opened(tmp_path / "b", split="test")] == ["0000:0", "0001:0"]
    with pytest.raises(ConfigError, match="holds the splits train, validation: give split"):
        DataConfig(path=tmp_path / "a").open()
    with pytest.raises(ConfigError, match="no split 'dev2'; it has test, train"):
        DataConfig(path=tmp_path / "b", split="dev2").open()
    write(tmp_path / "b" / "other" / "train" / "0000.parquet", columns)
    with pytest.raises(DataError, match=r"holds several data sets, such as .* and .*, each with train: give the path of one"):
        DataConfig(path=tmp_path / "b", split="test").open()


def test_rows_that_cannot_be_used_are_named_when_they_are_read(tmp_path: Path) -> None:
    columns = with_images()
    columns["image"][0] = columns["image"][1] = None
    columns["caption"][2] = [""]
    columns["caption"][3] = None
    columns["image"].append({"bytes": None, "path": "../../x.png"})
    columns["caption"].append(["x"])
    source = DataConfig(path=write(tmp_path / "t.parquet", columns)).open().source
    found = []
    for i in range(6):
        try:
            source[i]
        except DamagedSample as error:
            found.append((error.bad.key, error.bad.reason, error.bad.detail))
    assert found == [
        ("t:0", "no image", "t.parquet, row 0 has no image"), ("t:1", "no image", "t.parquet, row 1 has no image"), ("t:2", "empty caption", "t.parquet, row 2: the caption in 'caption' is empty"),
        ("t:3", "no text", "t.parquet, row 3 has no text"),
        ("t:5", "bad file name", f"t.parquet, row 5 names the image '../../x.png'; expected a file name inside the images folder {tmp_path}"),
    ]  # fmt: skip


def test_a_damaged_row_group_costs_its_rows_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "t.parquet", with_images(), row_group_size=2, compression="none", use_dictionary=False)
    data = bytearray(path.read_bytes())
    at = data.index(png("blue")) - 4  # the length of the third image
    data[at : at + 4] = b"\xff\xff\xff\x7f"
    path.write_bytes(data)
    source = DataConfig(path=path).open().source
    for i in (2, 3):
        with pytest.raises(DamagedSample, match=rf"t.parquet, row {i}: block 1 of .* cannot be read"):
            source[i]
    assert [source[i].captions[0] for i in (0, 1, 4)] == ["a red image", "a green image", "a black image"]


def test_large_sets_are_unpacked_once_into_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(parquet, "HELD", 100)
    path = write(tmp_path / "t.parquet", {**with_images(), "other": [0] * 5}, row_group_size=5)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "t-0.1.part").write_bytes(b"of a process that was killed")
    with ThreadPoolExecutor(2) as pool:  # one writes, and the other waits
        for samples in pool.map(lambda _: opened(path, cache=tmp_path / "cache"), range(2)):
            check_samples(samples)
    (record,) = caplog.records
    assert f"unpacking {path} once, about 0.0 GiB in {tmp_path / 'cache'} (data.train.cache)" in record.getMessage()
    assert f"read from an unpacked copy in {tmp_path / 'cache'}" in DataConfig(path=path, cache=tmp_path / "cache").open().sentence
    (copy,) = (tmp_path / "cache").glob("*.arrow")
    assert not list((tmp_path / "cache").glob("*.part"))
    changed = copy.stat().st_mtime_ns
    check_samples(opened(path, cache=tmp_path / "cache"))
    assert copy.stat().st_mtime_ns == changed
    assert len(caplog.records) == 1
    write(path, with_images(4))
    assert len(opened(path, cache=tmp_path / "cache")) == 4
    assert len(list((tmp_path / "cache").glob("*.arrow"))) == 2


def test_decoded_row_groups_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrow_rows, "HELD", 500)
    path = write(tmp_path / "t.parquet", with_images(), row_group_size=1)
    rows = ArrowRows(path, [path])
    for number in (0, 4, 1, 3, 2, 2, 0):
        assert rows[number]["image"] == with_images()["image"][number]
        assert rows.held_bytes <= 500


def test_lengths_of_texts_are_read_without_images(tmp_path: Path) -> None:
    columns = with_images()
    columns["caption"][1] = None
    for name, more in (("t.parquet", {}), ("several.parquet", {"image": [[image] for image in columns["image"]]})):
        source = DataConfig(path=write(tmp_path / name, {**columns, **more})).open().source
        lengths = source.text_lengths(lambda sample: len(sample.captions[0]))  # type: ignore[attr-defined]
        assert lengths.tolist() == [11, 0, 12, 13, 13]


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_conversations_with_images_beside_them_and_in_their_parts(suffix: str, tmp_path: Path) -> None:
    def said(*parts: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": [{"type": "text", "text": "red"}]}]

    image = with_images(1)["image"][0]
    beside = {"images": [[image], [image, image]], "messages": [said({"type": "image"}, {"type": "text", "text": "colour?"}), said({"type": "image"}, {"type": "image"})]}
    inside = {"messages": [said({"type": "image", "image": image}, {"type": "text", "text": "colour?"})] * 2}
    for k, columns in enumerate((beside, inside)):
        path = tmp_path / f"{k}{suffix}"
        if suffix == ".parquet":
            write(path, columns)
        else:
            with pa.ipc.new_file(path, pa.table(columns).schema) as writer:
                writer.write_table(pa.table(columns))
        source = DataConfig(path=path).open().source
        assert (source[0].image, source[0].captions, source[0].questions[0].text) == (png("red"), ("red",), "colour?")
        lengths = source.text_lengths(lambda sample: len(sample.questions[0].text) + len(sample.images))  # type: ignore[attr-defined]
        assert lengths.tolist() == [len(source[k].questions[0].text) + len(source[k].images) for k in range(2)]


@pytest.mark.parametrize(
    "columns, fields, message",
    [({"text": ["x"]}, {}, "no column that is known to hold images; it has 'text'"),
     (with_images(1), {"columns": {"caption": "captoin"}}, "no column 'captoin'; the nearest is 'caption'; it has 'image', 'caption'"),
     (with_images(0), {}, "holds no row"),
     (with_images(1), {"split": "train"}, "split train would not be read: .* is one file"),
     ({**with_images(1), "image": [3]}, {}, r"row 0: the image is 3 \(int\)")],
)  # fmt: skip
def test_wrong_columns_are_refused_in_one_sentence(columns: dict[str, Any], fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(AdalinkError, match=message):
        DataConfig(path=write(tmp_path / "t.parquet", columns), **fields).open()


def test_damaged_files_are_refused_in_one_sentence(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.parquet", with_images()).read_bytes()
    stream = io.BytesIO()
    with pa.ipc.new_stream(stream, pa.table(with_images()).schema) as writer:
        writer.write_table(pa.table(with_images()))
    cases = {
        "cut.parquet": (whole[:-20], "cannot be read: Parquet magic bytes not found"),
        "empty.parquet": (b"", "holds 0 bytes"),
        "page.parquet": (b"<html>not found</html>", "is no parquet or Arrow file: is it compressed, or not downloaded whole"),
        "cut.arrow": (stream.getvalue()[:-8], "a stream of Arrow batches without an end"),
        "half.arrow": (stream.getvalue()[:600] + stream.getvalue()[-8:], "cannot be read: Expected to"),
    }
    for name, (data, message) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=message) as raised:
            DataConfig(path=tmp_path / name).open()
        assert "\n" not in str(raised.value)
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "state.json").write_text(json.dumps({"_data_files": 3})[:-1])
    with pytest.raises(DataError, match="is not what `datasets` saves"):
        DataConfig(path=tmp_path / "disk").open()


def test_sets_of_all_kinds_are_mixed_by_weight(tmp_path: Path) -> None:
    columns = with_images()
    columns["image"][1] = None
    (tmp_path / "red.png").write_bytes(png("red"))
    (tmp_path / "t.csv").write_text("image,text\nred.png,a table\nnone.png,gone\n")
    opened = DataConfig(mix={str(write(tmp_path / "t.parquet", columns)): 3, str(tmp_path / "t.csv"): 1}).open()
    assert isinstance(opened.source, Mixture)
    assert (opened.source.sizes, opened.source.weights, opened.source[5].key) == ((5, 1), (3, 1), "t.csv:red.png")
    assert [bad.key for bad in opened.problems] == ["t.csv:none.png"]
    with pytest.raises(DamagedSample, match=r"t.parquet, row 1 has no image") as raised:
        opened.source[1]
    assert raised.value.bad.key == "t.parquet:t:1"


def test_a_name_of_the_hub_without_a_network_ends_with_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("owner/name", "owner/name:config"):
        with pytest.raises(DataError, match=f"^{name} is no file or folder here, and as a data set of the Hub it cannot be read: [^\n]*; check the path or the name$"):
            DataConfig(path=name).open()
    (tmp_path / "owner").mkdir()
    with pytest.raises(DataError, match="owner/name does not exist"):
        DataConfig(path="owner/name").open()


def test_without_pyarrow_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "t.parquet", with_images())
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"need pyarrow, which is not installed .*: pip install 'adalink\[parquet\]'"):
        DataConfig(path=path).open()
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"need the package datasets .*: pip install 'adalink\[datasets\]'"):
        parquet.HUB.open(Given(path=Path("owner/name")))
