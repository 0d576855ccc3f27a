"""GLUE's folders with their quirks, tables and folders of `datasets`, and the rows of few shots."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from shared import fixtures, shared

from adalink.errors import ConfigError, DataError
from multimodal.sample import Question
from tasks.data.sources import DataConfig
from tasks.data.text import GLUE, TextSource, open_disk, open_glue, open_table
from tasks.runs.config import Data

Row = dict[str, Any]


def expected() -> Any:
    return json.loads((fixtures("text_tasks") / "glue" / "expected.json").read_text())


def rows_of(source: TextSource) -> list[Row]:
    """As expected.json has them: text, pair where there is one, and the label's number, or a score, or null."""
    found = []
    for number in range(len(source)):
        (question,) = source[number].questions
        label = question.answers[0] if question.answers else None
        value = label and (source.labels.index(label) if source.labels else float(label))
        found.append({"text": question.text, **({"pair": question.pair} if question.pair else {}), "label": value})
    return found


def test_every_file_of_glue_is_read_as_expected() -> None:
    root, wanted = fixtures("text_tasks") / "glue", expected()
    n_files = 0
    for name, splits in wanted["expected"].items():
        task = GLUE[name.replace("-", "").lower()]
        assert list(task.labels or ()) == (wanted["labels"][name] or [])
        assert task.headline == wanted["headline"][name]
        for split, rows in splits.items():
            if split.endswith("_skipped"):
                continue
            source = open_glue(root / name, split)
            assert rows_of(source) == rows, (name, split)
            assert len(source.problems) == splits.get(f"{split}_skipped", 0)
            n_files += 1
    assert n_files == len(list(root.glob("*/*.tsv")))


@pytest.mark.parametrize("quote", ["", '"'], ids=["as it is", "a quote begins a field"])
def test_a_csv_reader_with_quotes_loses_rows_that_begin_with_one(tmp_path: Path, quote: str) -> None:
    """The control of the test above: such a reader gives the fixture's rows, and other ones where an odd quote begins a field, as in real files."""
    folder = tmp_path / "MRPC"
    folder.mkdir()
    text = (fixtures("text_tasks") / "glue" / "MRPC" / "train.tsv").read_text(encoding="utf-8-sig")
    (folder / "train.tsv").write_text(text.replace("\ta tram", f"\t{quote}a tram"), encoding="utf-8-sig")
    with (folder / "train.tsv").open(encoding="utf-8-sig", newline="") as file:
        rows = [{"text": row["#1 String"], "pair": row["#2 String"], "label": int(row["Quality"] or 0)} for row in csv.DictReader(file, delimiter="\t")]
    ours = rows_of(open_glue(folder / "train.tsv", ""))  # a file in place of its folder
    wanted = expected()["expected"]["MRPC"]["train"]
    assert [{**row, "text": row["text"].lstrip('"'), "pair": row["pair"].lstrip('"')} for row in ours] == wanted
    assert (rows == ours) == (not quote)


def test_real_sets_are_read_whole_though_their_folders_are_called_otherwise() -> None:
    assert [len(open_glue(shared("data/sst2"), split)) for split in ("train", "dev", "test")] == [6920, 872, 1821]
    assert [len(open_glue(shared("data/stsb"), split)) for split in ("train", "dev", "test")] == [5749, 1500, 1379]


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".tsv"])
def test_a_table_is_read_by_its_usual_columns_and_by_those_that_are_named(tmp_path: Path, ending: str) -> None:
    rows = [{"question": "is it red ?", "sentence2": "it is", "label": "yes"}, {"question": "so , blue ?", "sentence2": "no", "label": ""}]
    path = tmp_path / f"data{ending}"
    if ending == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="," if ending == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    usual = open_table(path, {})
    assert usual[0].questions == (Question(question_id=0, text="is it red ?", pair="it is", answers=("yes",)),)
    assert usual[1].questions[0].answers == ()
    assert usual[1].media is None
    assert usual.place(1).startswith("data")
    named = DataConfig(table=path, columns={"text": "sentence2", "pair": None, "label": "question"}).open().source[1].questions[0]
    assert (named.text, named.pair, named.answers) == ("no", "", ("so , blue ?",))


def test_a_folder_of_datasets_gives_the_words_of_its_classes_and_no_label_for_minus_one() -> None:
    folder = fixtures("text_tasks") / "disk"
    splits = {split: open_disk(folder, split, {}) for split in ("train", "validation", "test")}
    assert splits["train"].labels == ("not_entailment", "entailment")
    assert {row["label"] for row in rows_of(splits["train"])} == {0, 1}
    assert {row["label"] for row in rows_of(splits["test"])} == {None}
    datasets = pytest.importorskip("datasets")
    for split, source in splits.items():
        wanted = [{"text": row["sentence1"].strip(), "pair": row["sentence2"].strip(), "label": None if row["label"] < 0 else row["label"]}
                  for row in datasets.load_from_disk(folder)[split]]  # fmt: skip
        assert rows_of(source) == wanted
    with pytest.raises(ConfigError, match="has no split 'dev'; it has train, validation, test: give split"):
        open_disk(folder, "dev", {})


def test_shots_are_the_rows_of_published_subsets_and_validation_comes_after_them() -> None:
    cases = json.loads((fixtures("text_tasks") / "shots_dev.json").read_text())["cases"]
    train = shared("data/sst2")
    for shots, seed, name in ((500, 42, "n=6920 K=500 seed=42"), (100, 1, "n=6920 K=100 seed=1")):
        data = Data(train=DataConfig(glue=train, shots=shots, shots_seed=seed), val=DataConfig(after_shots=1000))
        assert data.train is not None
        learned, after = ([int(source[i].key) for i in range(len(source))] for source in (data.train.open().source, data.val.open().source))
        assert (learned[:10], sum(learned)) == (cases[name]["learnt_first_10"], cases[name]["learnt_sum"])
        assert (after[:10], sum(after)) == (cases[name]["validation_first_10"], cases[name]["validation_sum"])
        assert (len(learned), len(after), len({*learned, *after})) == (shots, 1000, shots + 1000)
    with pytest.raises(DataError, match=r"the data set's shots is 8000, and it holds 6,920 samples: give fewer shots"):
        DataConfig(glue=train, split="train", shots=8000).open()


# ---------------------------------------- bad input: one sentence each


def changed(tmp_path: Path, name: str, old: bytes, new: bytes) -> Path:
    folder = tmp_path / name
    shutil.copytree(fixtures("text_tasks") / "glue" / name, folder)
    text = (folder / "dev.tsv").read_bytes()
    assert old in text
    (folder / "dev.tsv").write_bytes(text.replace(old, new, 1))
    return folder


@pytest.mark.parametrize(
    ("name", "old", "new", "sentence"),
    [
        ("SST-2", b"sentence\t", b"review\t", r"has no column 'sentence'; it has 'review', 'label': name one in columns"),
        ("SST-2", b"\t0", b"\t2", r"dev.tsv, line 2 has the label '2': expected a number from 0 to 1, as SST-2 has them$"),
        ("SST-2", b"a quiet clerk hums without a sound . ", b" ", r"dev.tsv, line 2 has an empty text: expected words"),
        ("SST-2", b"quiet", b"qu\xffet", r"dev.tsv, line 2 is not UTF-8 \(invalid start byte\): write the file again"),
        ("SST-2", b"quiet", b"qu\0et", r"dev.tsv, line 2 holds a NUL character"),
        ("RTE", b"\tentailment", b"\tmaybe", r"dev.tsv, line 2 has the label 'maybe': expected one of entailment, not_entailment"),
        ("STS-B", b"4.144", b"high", r"dev.tsv, line 2 has the label 'high', and the metrics need numbers"),
    ],
)
def test_damaged_files_of_glue_are_refused(tmp_path: Path, name: str, old: bytes, new: bytes, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        open_glue(changed(tmp_path, name, old, new), "dev")


def test_damaged_tables_and_folders_are_refused(tmp_path: Path) -> None:
    table = tmp_path / "a.csv"
    table.write_text("words,label\nfine,1\n")
    with pytest.raises(DataError, match=r"a.csv has no column 'text'; it has 'words', 'label': name one in columns"):
        open_table(table, {})
    with pytest.raises(DataError, match="has no column 'sentence'"):
        open_table(table, {"text": "sentence"})
    with pytest.raises(ConfigError, match="columns has the role 'image'"):
        open_table(table, {"image": "words"})
    table.write_bytes(b"text,label\nfine,1\nb\xffd,0\n")
    with pytest.raises(DataError, match=r"a.csv, line 3 is not UTF-8"):
        open_table(table, {})
    table.write_bytes(b"text,label\nfi\0ne,1\n")
    with pytest.raises(DataError, match=r"a.csv, line 2 holds a NUL character"):
        open_table(table, {})
    swallowed = tmp_path / "a.tsv"
    swallowed.write_text('text\tlabel\n"a quote\t1\nb"\t0\n')
    with pytest.raises(DataError, match=r"a.tsv, line 2 holds a line feed in a field: expected one row a line"):
        open_table(swallowed, {})
    with pytest.raises(ConfigError, match=r"ends in '.parquet': expected a table that ends in .jsonl, .csv or .tsv"):
        open_table(tmp_path / "a.parquet", {})
    with pytest.raises(DataError, match="is no folder that `datasets` saved"):
        open_disk(tmp_path, "train", {})
    with pytest.raises(ConfigError, match=r"is named after no task of GLUE: expected one of CoLA, SST-2"):
        open_glue(tmp_path, "dev")
    (tmp_path / "RTE").mkdir()
    with pytest.raises(DataError, match=r"dev.tsv does not exist; .* holds no .tsv file: give split"):
        open_glue(tmp_path / "RTE", "dev")


def test_a_folder_of_datasets_needs_pyarrow(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise ConfigError("No module named 'pyarrow'")

    monkeypatch.setattr("tasks.data.text.import_arrow", refuse)
    with pytest.raises(ConfigError, match=r"needs pyarrow .*: pip install 'adalink\[datasets\]'"):
        open_disk(Path("saved"), "train", {})


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"glue": Path("a"), "columns": {"text": "b"}}, "columns would not be read"),
        ({"table": Path("a.csv"), "split": "dev"}, "split would not be read"),
        ({"table": Path("a.csv"), "after_shots": 5}, "give 0 or more, and shots with after_shots"),
    ],
)
def test_settings_that_would_not_be_read_are_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        DataConfig(**settings)
    with pytest.raises(ConfigError, match=r"after_shots, which are rows of data.train, and data.train is not given"):
        DataConfig(after_shots=3).open()
