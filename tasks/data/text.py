"""Texts with labels: GLUE's folders as its script leaves them, tables with named columns, and folders that `datasets` saved."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from adalink.errors import ConfigError, DataError
from multimodal.sample import BadSample, Question, Sample, SampleSource
from tasks.data.arrow.rows import ArrowRows, import_arrow
from tasks.data.files import FileSource
from tasks.data.rows import open_rows, unpacked_suffix

__all__ = ["GLUE", "GlueTask", "TextSource", "open_disk", "open_glue", "open_table", "text_source_of"]


@dataclass(frozen=True, kw_only=True)
class GlueTask:
    """One of GLUE's nine: its columns, its label words in their order (none where labels are numbers), and how it is scored.

    columns   text, pair ("" for none), label
    numbered  the files hold a label's number in place of its word, and so does a submission
    files     what submissions call the split, by the name of the file that is read
    """

    name: str
    columns: tuple[str, str, str]
    labels: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ("accuracy",)
    headline: str = "accuracy"
    numbered: bool = True
    names: Mapping[str, str] = field(default_factory=dict)

    def submission(self, split: str) -> str:
        """The name of the file that GLUE's server takes for a split: `CoLA.tsv`, `MNLI-mm.tsv`."""
        return f"{self.names.get(split, self.name)}.tsv"


_ENTAILS = ("entailment", "not_entailment")
_F1 = ("f1", "accuracy")
_MNLI = {split: f"MNLI-{short}" for kind, short in (("matched", "m"), ("mismatched", "mm")) for split in (f"test_{kind}", f"dev_{kind}", kind)}
_PAIR = ("sentence1", "sentence2", "label")

GLUE: Mapping[str, GlueTask] = {
    re.sub(r"\W", "", task.name).lower(): task
    for task in (
        GlueTask(
            name="CoLA", columns=("3", "", "1"), labels=("unacceptable", "acceptable"), metrics=("matthews_correlation",), headline="matthews_correlation"
        ),
        GlueTask(name="SST-2", columns=("sentence", "", "label"), labels=("negative", "positive")),
        GlueTask(name="MRPC", columns=("#1 String", "#2 String", "Quality"), labels=("not_equivalent", "equivalent"), metrics=_F1, headline="f1"),
        GlueTask(name="QQP", columns=("question1", "question2", "is_duplicate"), labels=("not_duplicate", "duplicate"), metrics=_F1, headline="f1"),
        GlueTask(name="STS-B", columns=("sentence1", "sentence2", "score"), metrics=("pearson", "spearmanr"), headline="spearmanr"),
        GlueTask(
            name="MNLI", columns=("sentence1", "sentence2", "gold_label"), labels=("entailment", "neutral", "contradiction"), numbered=False, names=_MNLI
        ),
        GlueTask(name="QNLI", columns=("question", "sentence", "label"), labels=_ENTAILS, numbered=False),
        GlueTask(name="RTE", columns=_PAIR, labels=_ENTAILS, numbered=False),
        GlueTask(name="WNLI", columns=_PAIR, labels=_ENTAILS[::-1]),
    )
}


class TextSource(FileSource):
    """Rows as samples without an image, each with one question: its text, its pair where it has one, and its label as the one answer.

    labels   the label words in their order; empty where labels are numbers, or nothing but the rows says them
    glue     the task of GLUE that the rows are of
    split    of that task, as its file is named
    """

    def __init__(self, rows: Iterable[_Row], read_from: Path, labels: tuple[str, ...] = (), glue: GlueTask | None = None, split: str = "") -> None:
        """Raises DataError for an empty text, and for a label that is none of the words (or, of a task without words, no number)."""
        self._places: list[str] = []
        problems: list[BadSample] = []
        samples, number = [], -1
        for number, row in enumerate(rows):
            if row.text is None:
                problems.append(BadSample(key=str(number), reason="short row", detail=f"{row.place} has too few fields"))
            else:
                samples.append(_sample(number, row, labels))
                self._places.append(row.place)
        super().__init__(samples, problems, read_from=read_from, item_ids=range(number + 1))
        self.labels, self.glue, self.split = labels, glue, split

    def place(self, index: int) -> str:
        """`dev.tsv, line 7`."""
        return self._places[index]


@dataclass(frozen=True)
class _Row:
    """text: None where the row has too few fields. label: None where the file has none."""

    place: str
    text: str | None
    pair: str | None = None
    label: str | None = None


def _sample(number: int, row: _Row, labels: Sequence[str]) -> Sample:
    text, pair = (None if one is None else one.strip() for one in (row.text, row.pair))
    if not text or pair == "":
        raise DataError(f"{row.place} has an empty {'text' if not text else 'second text'}: expected words, so write some, or take the row out")
    if "\0" in text + (pair or ""):
        raise DataError(f"{row.place} holds a NUL character: expected a text in UTF-8, so write the row again")
    label = None if row.label is None else row.label.strip()
    if label and labels and label not in labels:
        raise DataError(f"{row.place} has the label {label!r}: expected one of {', '.join(labels)}; mend the row, or list the words in text.labels")
    question = Question(question_id=number, text=text, pair=pair or "", answers=(label,) if label else ())
    return Sample(key=str(number), image_id=number, media=None, questions=(question,))


def text_source_of(source: SampleSource) -> TextSource | None:
    """The rows that a data set is chosen from; None where it holds no texts with labels."""
    while not isinstance(source, TextSource):
        inner: SampleSource | None = getattr(source, "source", None)
        if inner is None:
            return None
        source = inner
    return source


# ----------------------------------------
# GLUE's folders. Fields lie between tabs, and a quote is a letter: a CSV reader would take the rows between two odd quotes for one.


def open_glue(path: Path, split: str) -> TextSource:
    """The rows of a split of DIR/CoLA, DIR/MNLI, ... (or of one of its files), with the label words of the task that the folder is named after.

    Raises ConfigError for a folder of another name, DataError as `TextSource` and for a file that is missing, or has other columns.
    """
    folder, file = (path.parent, path) if path.is_file() else (path, path / f"{split}.tsv")
    task = GLUE.get(re.sub(r"[\W_]", "", folder.resolve().name).lower())
    if task is None:
        raise ConfigError(f"{folder} is named after no task of GLUE: expected one of {', '.join(one.name for one in GLUE.values())}, or give table")
    if not file.is_file():
        found = sorted(one.name for one in folder.glob("*.tsv"))
        raise DataError(f"{file} does not exist; {folder} holds {', '.join(found) or 'no .tsv file'}: give split, such as {Path((found or ['dev'])[0]).stem}")
    return TextSource(_glue_rows(file, task), file, task.labels, task, file.stem)


def _glue_rows(file: Path, task: GlueTask) -> Iterator[_Row]:
    lines = _lines(file)
    is_bare = task.name == "CoLA" and not file.stem.startswith("test")  # its training and dev files have no line of names
    names = ["0", "1", "2", "3"] if is_bare else next(lines, ("", [""]))[1]
    text, pair, label = task.columns
    if task.name == "CoLA" and not is_bare:
        text = "sentence"
    if missing := [name for name in (text, pair) if name and name not in names]:
        raise _no_column(missing[0], file, names)
    if label not in names and not file.stem.startswith("test"):
        raise _no_column(label, file, names)
    for place, fields in lines:
        if len(fields) < len(names):
            yield _Row(place, None)
            continue
        row = dict(zip(names, fields, strict=False)) | ({names[-1]: fields[-1]} if label == names[-1] else {})
        yield _Row(place, row[text], row[pair] if pair else None, _glue_label(row.get(label), task, place))


def _glue_label(value: str | None, task: GlueTask, place: str) -> str | None:
    if value is None or not task.numbered or not task.labels:
        return value if value is None or task.labels else _number(value, place)
    if value.strip() not in map(str, range(len(task.labels))):
        raise DataError(f"{place} has the label {value!r}: expected a number from 0 to {len(task.labels) - 1}, as {task.name} has them")
    return task.labels[int(value)]


def _number(value: str, place: str) -> str:
    try:
        float(value)
    except ValueError:
        raise DataError(f"{place} has the label {value!r}, and the metrics need numbers: write a score there, or give text.metrics: [accuracy]") from None
    return value.strip()


def _lines(file: Path) -> Iterator[tuple[str, list[str]]]:
    """The fields of each line with its place. Raises DataError for a line that is not UTF-8."""
    for number, line in enumerate(file.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            yield f"{file.name}, line {number}", line.decode().rstrip("\r").split("\t")
        except UnicodeDecodeError as error:
            raise DataError(f"{file.name}, line {number} is not UTF-8 ({error.reason}): write the file again in UTF-8") from None


def _no_column(name: str, file: Path, names: Iterable[str]) -> DataError:
    return DataError(f"{file} has no column {name!r}; it has {', '.join(map(repr, names))}: name one in columns, as in columns: {{text: sentence}}")


# ----------------------------------------
# Tables, and folders of `datasets.Dataset.save_to_disk`: columns by their usual names, or as the config names them.


_USUAL: Mapping[str, tuple[str, ...]] = {
    "text": ("text", "sentence", "sentence1", "question1", "premise", "question"),
    "pair": ("pair", "sentence2", "question2", "hypothesis"),
    "label": ("label", "score"),
}


def open_table(path: Path, columns: Mapping[str, str | None], labels: tuple[str, ...] = ()) -> TextSource:
    """The rows of a .jsonl, .csv or .tsv file. columns: text, pair and label by the names that the file has; null for none.

    Raises DataError as `TextSource`, and where there is no such column; ConfigError for another role.
    """
    if unpacked_suffix(path) not in (".jsonl", ".csv", ".tsv"):
        raise ConfigError(f"{path} ends in {path.suffix!r}: expected a table that ends in .jsonl, .csv or .tsv")
    if path.is_file() and path.suffix != ".gz":
        for _ in _lines(path):  # which names the line of a byte that is not UTF-8
            pass
    rows = open_rows(path)
    return TextSource(_named_rows(rows, rows.place, _chosen_columns(path, rows.columns, columns)), path, labels)


def _chosen_columns(path: Path, names: Sequence[str], given: Mapping[str, str | None]) -> tuple[str, str | None, str | None]:
    """Of text, pair and label."""
    if unknown := [role for role in given if role not in _USUAL]:
        raise ConfigError(f"columns has the role {unknown[0]!r}: texts with labels have text, pair and label")
    if missing := [name for name in given.values() if name is not None and name not in names]:
        raise _no_column(missing[0], path, names)
    found = {role: given[role] if role in given else next((name for name in _USUAL[role] if name in names), None) for role in _USUAL}
    if found["text"] is None:
        raise _no_column("text", path, names)
    return found["text"], found["pair"], found["label"]


def _named_rows(rows: Iterable[Mapping[str, object]], place: Callable[[int], str], names: tuple[str, str | None, str | None]) -> Iterator[_Row]:
    text, pair, label = names
    for number, row in enumerate(rows):
        values = [None if name is None else _word(row.get(name), name, place(number)) for name in (text, pair, label)]
        if any("\n" in (value or "") for value in values) and place(number).partition(",")[0].endswith(".tsv"):
            raise DataError(
                f"{place(number)} holds a line feed in a field: expected one row a line, so a quote is probably a letter there; give the file as glue, "
                "or as .csv or .jsonl"
            )
        yield _Row(place(number), values[0] or "", values[1], values[2])


def _word(value: object, name: str, place: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool | int | float):
        return str(value)
    raise DataError(f"{place} has a {type(value).__name__} in the column {name!r}: expected a text")


def open_disk(path: Path, split: str, columns: Mapping[str, str | None], labels: tuple[str, ...] = ()) -> TextSource:
    """The rows of a split of a folder that `datasets` saved (`save_to_disk`); the names of a ClassLabel are the label words, and -1 is no label.

    Raises ConfigError where pyarrow is not installed, or there is no such split; DataError as `open_table`, and for a damaged folder.
    """
    try:
        import_arrow()
    except ConfigError as error:
        raise ConfigError(f"{path} was saved by `datasets`, and reading it needs pyarrow ({error}): pip install 'adalink[datasets]'") from None
    folder = path
    try:
        if (path / "dataset_dict.json").exists():
            splits = json.loads((path / "dataset_dict.json").read_bytes())["splits"]
            if split not in splits:
                raise ConfigError(f"{path} has no split {split!r}; it has {', '.join(splits)}: give split")
            folder = path / split
        files = [folder / one["filename"] for one in json.loads((folder / "state.json").read_bytes())["_data_files"]]
        features = json.loads((folder / "dataset_info.json").read_bytes())["features"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder} is no folder that `datasets` saved ({error}): expected dataset_dict.json, or state.json and dataset_info.json") from None
    rows = ArrowRows(folder, files)
    names = _chosen_columns(folder, rows.columns, columns)
    words = tuple(features.get(names[2] or "", {}).get("names") or ())
    return TextSource(_classes(_named_rows(rows, rows.place, names), words), folder, labels or words)


def _classes(rows: Iterable[_Row], words: Sequence[str]) -> Iterator[_Row]:
    """The words of a ClassLabel's numbers."""
    for row in rows:
        number = int(row.label) if words and row.label is not None else 0
        if number >= len(words) > 0:
            raise DataError(f"{row.place} has the label {number}: expected a number from 0 to {len(words) - 1}, or -1 for none")
        yield row if not words or row.label is None else _Row(row.place, row.text, row.pair, words[number] if number >= 0 else None)
