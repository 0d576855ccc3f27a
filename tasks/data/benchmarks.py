"""The native files of benchmarks, each a short declaration: where its rows lie, which fields they have, how their image files are named."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from string import ascii_uppercase

from adalink.errors import ConfigError, DataError
from multimodal.sample import counted
from tasks.data.columns import Asked, Columns, Parts, listed_names
from tasks.data.files import ImageFolder, annotation_document, text_lines
from tasks.data.reader import Found, Given, Official, Reader
from tasks.data.rows import BY_ID, ID, Row, RowFile, open_rows
from tasks.data.table import TableSource

__all__ = ["BENCHMARKS", "READERS", "Benchmark", "BenchmarkSource", "benchmark_questions", "find_benchmark"]

FILES = "(files)"  # a folder with a file for each image


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """The layout of a benchmark's official file.

    inside       where the rows lie: None in a list, BY_ID in an object of rows by their ids, FILES in a file for each image, else in the
                 list under this key
    signs        fields by which its rows are known; `field=start` where it begins so
    no_signs     fields that its rows do not have
    images       names that a row's image may have below the folder, made of the row's fields; `name`: its own without folders
    question, answers, caption, choices, right, kinds
                 fields of a row; right: the number of the choice that is right, from 0; kinds: question type and answer type
    letters      whether one of `choices` is asked for, by its letter
    context      a field with a text before the question
    split        a field with the split, where a file holds several
    optional     the field that is null in rows without an image; these are left out
    question_id, image_id   what the benchmark calls its questions and images
    scorer       of the task vqa; empty: the official VQA accuracy
    official     the fields of its result file: id and text
    """

    name: str
    about: str
    inside: str | None = None
    signs: tuple[str, ...]
    no_signs: tuple[str, ...] = ()
    images: tuple[str, ...]
    question: str = "question"
    answers: str = "answers"
    caption: str | None = None
    choices: str = "choices"
    right: str = "answer"
    letters: bool = False
    context: str | None = None
    kinds: tuple[str | None, str | None] = (None, None)
    question_id: str | None = "question_id"
    image_id: str | None = None
    split: str | None = None
    optional: str | None = None
    scorer: str = ""
    official: tuple[str, str] = ("question_id", "answer")

    def is_of(self, row: Row) -> bool:
        """Whether a file's first row is one of this benchmark."""
        named = (sign.partition("=") for sign in self.signs)
        return all(name in row and str(row[name]).startswith(start) for name, _, start in named) and not any(
            name in row for name in self.no_signs
        )

    def recognises(self, found: Found) -> bool:
        """Whether a path is a file of this benchmark."""
        if self.inside == FILES:
            return found.is_folder and _questions_folder(found.path) is not None
        return self.is_of(_first_row(found, self.inside))


_TEXT_IMAGES = ("{image_id}.jpg", "train_images/{image_id}.jpg", "test_images/{image_id}.jpg")
_COCO_IMAGES = (
    "{image_id:012d}.jpg", "{split}2017/{image_id:012d}.jpg", "train2017/{image_id:012d}.jpg", "val2017/{image_id:012d}.jpg",
    "train2014/COCO_train2014_{image_id:012d}.jpg", "val2014/COCO_val2014_{image_id:012d}.jpg", "COCO_train2014_{image_id:012d}.jpg",
    "COCO_val2014_{image_id:012d}.jpg",
)  # fmt: skip
_AOKVQA_SIGNS = ("split", "question", "choices", "question_id", "image_id")

BENCHMARKS: tuple[Benchmark, ...] = (
    Benchmark(
        name="textcaps", about="TextCaps' captions", inside="data", signs=("image_id", "image_name", "image_path"), no_signs=("question",),
        images=(*_TEXT_IMAGES, "{image_path}"), caption="caption_str", question_id=None, image_id="image_id", official=("image_id", "caption"),
    ),
    Benchmark(
        name="textvqa", about="TextVQA's questions", inside="data", signs=("question", "question_id", "image_id"), no_signs=("file_path",),
        images=_TEXT_IMAGES, image_id="image_id",
    ),
    Benchmark(
        name="vizwiz", about="VizWiz's questions", signs=("image=VizWiz_", "question"),
        images=("{image}", "train/{image}", "val/{image}", "test/{image}"), question_id="image", kinds=(None, "answer_type"),
        official=("image", "answer"),
    ),
    Benchmark(
        name="aokvqa", about="A-OKVQA's questions with direct answers", signs=_AOKVQA_SIGNS, images=_COCO_IMAGES, answers="direct_answers",
        image_id="image_id", official=("question_id", "direct_answer"),
    ),
    Benchmark(
        name="aokvqa_choices", about="A-OKVQA's questions with their choices", signs=_AOKVQA_SIGNS, images=_COCO_IMAGES, letters=True,
        right="correct_choice_idx", image_id="image_id", scorer="choice",
    ),
    Benchmark(
        name="gqa", about="GQA's questions", inside=BY_ID, signs=("imageId", "question"), images=("{imageId}.jpg", "images/{imageId}.jpg"),
        answers="answer", kinds=("types.structural", "types.semantic"), question_id=ID, image_id="imageId", scorer="exact",
        official=("questionId", "prediction"),
    ),
    Benchmark(
        name="stvqa", about="ST-VQA's questions", inside="data", signs=("file_path", "question"), images=("{file_path}", "{name}"), scorer="anls",
    ),
    Benchmark(
        name="docvqa", about="DocVQA's questions", inside="data", signs=("questionId", "image", "question"),
        images=("{image}", "{name}", "documents/{name}"), question_id="questionId", kinds=("question_types", None), scorer="anls",
        official=("questionId", "answer"),
    ),
    Benchmark(
        name="infovqa", about="InfographicVQA's questions", inside="data", signs=("questionId", "image_local_name", "question"),
        images=("{image_local_name}", "infographicsvqa_images/{image_local_name}"), question_id="questionId", kinds=(None, "answer_type"),
        scorer="anls", official=("questionId", "answer"),
    ),
    Benchmark(
        name="chartqa", about="ChartQA's questions", signs=("imgname", "query"), images=("{imgname}", "png/{imgname}"), question="query",
        answers="label", question_id=None, scorer="relaxed",
    ),
    Benchmark(
        name="scienceqa", about="ScienceQA's questions", inside=BY_ID, signs=("question", "choices", "image", "split"),
        images=("{split}/{(id)}/{image}", "images/{split}/{(id)}/{image}"), letters=True, context="hint", kinds=("subject", None),
        question_id=ID, split="split", optional="image", scorer="choice",
    ),
    Benchmark(
        name="ai2d", about="AI2D's questions", inside=FILES, signs=("imageName", "answerTexts", "correctAnswer"),
        images=("{folder}/{imageName}", "images/{imageName}", "{imageName}"), choices="answerTexts", right="correctAnswer", letters=True,
        question_id="questionId", split="split", scorer="choice",
    ),
)  # fmt: skip


def _first_row(found: Found, inside: str | None) -> Row:
    """The first row of a file, were it of a benchmark whose rows lie there; empty where none do."""
    if inside is None:
        return found.row
    if inside == BY_ID:
        return found.by_id
    rows = found.document.get(inside)
    return rows[0] if isinstance(rows, list) and rows and isinstance(rows[0], dict) else {}


# ----------------------------------------
# What a row holds.


_ROLES = ("image", "caption", "question", "answers", "image_id", "question_id", "question_type", "answer_type")


class BenchmarkRows:
    """How the rows of a benchmark's file are read: each is made one with the usual columns. folder: of the images; None where only texts are read."""

    def __init__(self, benchmark: Benchmark, folder: ImageFolder | None, first: Row) -> None:
        self.benchmark, self._folder = benchmark, folder
        texts = {"caption"} if benchmark.caption else {"question", "answers", "question_id", "question_type", "answer_type"}
        if benchmark.caption is not None and benchmark.caption not in first:
            texts = set()  # a test split
        self._columns = Columns(roles={role: role for role in _ROLES if role in texts | {"image", "image_id"}})
        self.has_texts = self._columns.has_texts

    @property
    def sentence(self) -> str:
        """Which fields are the texts, and what scores them."""
        one = self.benchmark
        if one.caption is not None:
            return f"caption: {one.caption}"
        texts = f"{one.choices} in the question, answer: the letter of {one.right}" if one.letters else f"answers: {one.answers}"
        return f"question: {one.question}, {texts}; scorer: {one.scorer or 'official'}"

    def parts(self, row: Row, place: Callable[[], str]) -> Parts:
        """What a row holds. Raises DataError."""
        one = self.benchmark
        plain: dict[str, object] = {
            "image": self.image(row, place), "image_id": row.get(one.image_id or ""), "question_id": row.get(one.question_id or "")
        }  # fmt: skip
        if one.caption is not None:
            return self._columns.parts({**plain, "caption": row.get(one.caption)}, place)
        kind, answer_kind = (_words(_field(row, name)) for name in one.kinds)
        plain |= {
            "question_type": kind,
            "answer_type": answer_kind,
            "question": self._question(row, place),
            "answers": self._answers(row, place),
        }
        return self._columns.parts(plain, place)

    def image(self, row: Row, place: Callable[[], str]) -> str:
        """The first of the names that a file has; the first of all where there is none. Raises DataError where the row has no field for one."""
        if self._folder is None:
            return "-"
        names: list[str] = []
        values = dict(row)
        for pattern in self.benchmark.images:
            try:
                names.append(pattern.format_map(values))
            except (KeyError, ValueError, TypeError):
                continue  # a field that this split does not have
            values.setdefault("name", names[-1].rpartition("/")[2])
            if self._folder.has(names[-1], place):
                return names[-1]
        if not names:
            raise DataError(
                f"{place()} has the fields {listed_names(list(row))}; expected those of an image's name, {self.benchmark.images[0]}"
            )
        return names[0]

    def _question(self, row: Row, place: Callable[[], str]) -> object:
        """The question, with its choices a line each as LLaVA and lmms-eval word them."""
        question = row.get(self.benchmark.question)
        if not self.benchmark.letters or not isinstance(question, str) or not question.strip():
            return question
        context = row.get(self.benchmark.context or "")
        lines = [f"Context: {context.strip()}"] if isinstance(context, str) and context.strip() else []
        choices = (f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, self._choices(row, place), strict=False))
        return "\n".join((*lines, question.strip(), *choices))

    def _choices(self, row: Row, place: Callable[[], str]) -> Sequence[object]:
        found = row.get(self.benchmark.choices)
        if not isinstance(found, list) or not 1 < len(found) <= len(ascii_uppercase):
            raise DataError(
                f"{place()}: {self.benchmark.choices!r} is {found!r:.40}; expected a list of 2 to {len(ascii_uppercase)} choices"
            )
        return found

    def _answers(self, row: Row, place: Callable[[], str]) -> object:
        """People's answers; of choices the letter of the right one. None in a test split."""
        if not self.benchmark.letters:
            return row.get(self.benchmark.answers)
        right, n_choices = row.get(self.benchmark.right), len(self._choices(row, place))
        if right is None:
            return None
        if not isinstance(right, int) or isinstance(right, bool) or not 0 <= right < n_choices:
            raise DataError(
                f"{place()}: {self.benchmark.right!r} is {right!r:.40}; expected the number of one of {n_choices} choices, from 0"
            )
        return ascii_uppercase[right]


def _field(row: Row, name: str | None) -> object:
    """A field, of an object in the row too: `types.semantic`."""
    value: object = row
    for part in (name or "").split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _words(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value or "")


# ----------------------------------------
# The rows of a file that a data set is made of.


class ChosenRows:
    """Some rows of a file, in its order. left_out: how many rows are left out because they have no image."""

    def __init__(self, rows: RowFile, numbers: Sequence[int], split: str, left_out: int = 0) -> None:
        self.path, self._rows, self._numbers, self.left_out = rows.path, rows, numbers, left_out
        self.columns = rows.columns
        self.fingerprint = hashlib.sha256(f"{rows.fingerprint} {split}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, number: int) -> Row:
        return self._rows[self._numbers[number]]

    def __iter__(self) -> Iterator[Row]:
        return (self._rows[number] for number in self._numbers)

    def place(self, number: int) -> str:
        """That of the file."""
        return self._rows.place(self._numbers[number])


def _chosen(rows: RowFile, benchmark: Benchmark, split: str | None) -> RowFile:
    """The rows of a split that have an image. Raises ConfigError where the split is not there, or one of several is to be chosen."""
    if benchmark.split is None:
        if split is not None:
            raise ConfigError(f"{rows.path.name} is one split of {benchmark.name}: leave split {split!r} out")
        return rows
    splits = [str(row.get(benchmark.split) or "") for row in rows]
    known = sorted(set(splits))
    if split is None and len(known) > 1:
        raise ConfigError(f"{rows.path} holds several splits, {', '.join(known)}: give split")
    wanted = split.split("+") if split else known
    if unknown := [name for name in wanted if name not in known]:
        raise ConfigError(f"{rows.path} has no split {unknown[0]!r}; it has {', '.join(filter(None, known)) or 'one that has no name'}")
    of_split = [number for number, name in enumerate(splits) if name in wanted]
    if benchmark.optional is None:
        return ChosenRows(rows, of_split, "+".join(wanted))
    numbers = [number for number in of_split if rows[number].get(benchmark.optional)]
    return ChosenRows(rows, numbers, "+".join(wanted), len(of_split) - len(numbers))


class FilesOfQuestions:
    """AI2D: a file for each image, with its questions in an object; all are in memory.

    path   the folder `questions`; beside it ai2d_test_ids.csv names the images of the test split
    """

    def __init__(self, path: Path) -> None:
        """Raises DataError where a file is of another shape."""
        self.path = path
        listed = path.parent / "ai2d_test_ids.csv"
        test = {line.strip('"').removesuffix(".png") for line in text_lines(listed.read_text("utf-8-sig"))} if listed.is_file() else set()
        self._rows: list[Row] = []
        for file in sorted(path.glob("*.json")):
            self._rows += _of_file(file, "" if not test else "test" if file.name.split(".")[0] in test else "train")
        if not self._rows:
            raise DataError(f"{path} holds no question: expected files such as 0.png.json")
        self.fingerprint = hashlib.sha256(repr(self._rows).encode("utf-8", "backslashreplace")).hexdigest()

    @property
    def columns(self) -> tuple[str, ...]:
        """Of the first question."""
        return tuple(self._rows[0])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> Row:
        return self._rows[number]

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)

    def place(self, number: int) -> str:
        """`0.png.json: 0.png-3`."""
        return f"{self._rows[number]['file']}: {self._rows[number].get('questionId')}"


def _of_file(file: Path, split: str) -> Iterator[Row]:
    document = annotation_document(file)
    questions = document.get("questions") if isinstance(document, dict) else None
    if not isinstance(document, dict) or not isinstance(questions, dict) or not isinstance(document.get("imageName"), str):
        raise DataError(f"{file} is no file of AI2D's questions; expected an object with imageName and questions")
    for question, row in questions.items():
        if not isinstance(row, dict):
            raise DataError(f"{file}: {question[:40]!r} is {row!r:.40}; expected an object with answerTexts and correctAnswer")
        folder = "abc_images" if row.get("abcLabel") else "images"  # letters are painted over the labels that such a question asks for
        yield {**row, "question": question, "imageName": document["imageName"], "folder": folder, "file": file.name, "split": split}


def _questions_folder(path: Path) -> Path | None:
    """The folder of AI2D's questions: itself, or `questions` in it."""
    return next((folder for folder in (path, path / "questions") if next(folder.glob("*.png.json"), None) is not None), None)


def _rows(path: Path, benchmark: Benchmark, split: str | None) -> RowFile:
    if benchmark.inside == FILES:
        found = _questions_folder(path) if path.is_dir() else None
        if found is None:
            raise DataError(f"{path} holds no file of AI2D's questions; expected its folder, with questions/0.png.json")
        return _chosen(FilesOfQuestions(found), benchmark, split)
    return _chosen(open_rows(path, benchmark.inside), benchmark, split)


# ----------------------------------------
# Benchmarks as data sets.


class BenchmarkSource(TableSource):
    """The samples of a benchmark's file.

    scorer   of the task vqa, where a config names none; empty: the official VQA accuracy
    """

    def __init__(self, rows: RowFile, reading: BenchmarkRows, *, images: Path) -> None:
        super().__init__(rows, reading, images=images)
        self._benchmark = reading.benchmark
        self.scorer = reading.benchmark.scorer

    @property
    def sentence(self) -> str:
        """What was understood, and what was left out."""
        left_out = getattr(self._rows, "left_out", 0)
        return super().sentence + (f"; {counted(left_out, 'question')} without an image left out" if left_out else "")

    @cached_property
    def official(self) -> Official:
        """What the benchmark calls the images or questions of `item_ids`, for its result file."""
        one = self._benchmark
        named: dict[object, object] = {}
        for number, row in enumerate(self._rows):
            parts = self._reading.parts(row, partial(self._rows.place, number))
            if one.caption is not None:
                named.setdefault(parts.images, row.get(one.image_id or ""))
            elif parts.questions:
                named[number] = row.get(one.question_id or "")
        ids = {item: name for item, name in zip(self.item_ids, named.values(), strict=True) if isinstance(name, (int, str))}
        return Official(id_name=one.official[0], text_name=one.official[1], ids=ids)


def _open(benchmark: Benchmark, given: Given) -> BenchmarkSource:
    """Raises DataError and ConfigError."""
    rows = _rows(given.path, benchmark, given.split)
    if not len(rows):
        raise DataError(f"{given.path} gives no sample of the split {given.split}: no row of it has an image")
    images = given.images or (rows.path.parent if benchmark.inside == FILES else given.folder)
    return BenchmarkSource(rows, BenchmarkRows(benchmark, ImageFolder(images), rows[0]), images=images)


READERS: tuple[Reader, ...] = tuple(Reader(one.name, one.about, one.recognises, partial(_open, one), reads=("split",)) for one in BENCHMARKS)


def find_benchmark(path: Path) -> tuple[Benchmark, ...]:
    """Those that a path may be a file of."""
    found = Found(path)
    return tuple(one for one in BENCHMARKS if one.recognises(found))


def benchmark_questions(path: Path, benchmark: Benchmark, split: str | None = None) -> Iterator[tuple[int | str, Asked]]:
    """The questions of a benchmark's file by its own ids, without a look at the images. Raises DataError and ConfigError."""
    rows = _rows(path, benchmark, split)
    reading = BenchmarkRows(benchmark, None, rows[0])
    for number, row in enumerate(rows):
        name = row.get(benchmark.question_id or "")
        for asked in reading.parts(row, partial(rows.place, number)).questions:
            yield name if isinstance(name, (int, str)) else number, asked
