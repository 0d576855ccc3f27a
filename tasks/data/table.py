"""A data set whose samples are rows of a file: rows about one image are one sample, and each is read when it is asked for."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from multimodal.sample import BadSample, Measure, Question, Sample, counted, measured
from tasks.data.columns import ImageValue, Parts, Reading, choose_columns, listed_names
from tasks.data.files import ImageFolder, no_sample
from tasks.data.reader import Given, Reader
from tasks.data.rows import RowFile, open_rows

__all__ = ["READER", "Scan", "TableSource", "open_table", "relative_name"]


class TableSource:
    """Samples made of rows, in the order in which their images first come; the rows of an image stay in theirs.

    The key is the image's id where each image has one of its own, else its name. Ids that are whole numbers are the ids of results; else
    images, and questions, are counted from 0 in the file's order.

    problems   what rows name and the data set cannot give: images that are not there, images without a text, empty texts
    beyond     how many rows have what not every model reads: several images, no image, earlier turns
    """

    def __init__(self, rows: RowFile, reading: Reading, *, images: Path, scan: type[Scan] | None = None) -> None:
        """Read every row once and hold none. images: the folder of images. scan: how the rows are read; by default one after the other.

        Raises DataError where a row is damaged, and where no sample is left.
        """
        self._rows, self._reading, self._root = rows, reading, images
        found = (scan or Scan)(rows, reading, ImageFolder(images), images)
        self.problems = tuple(found.problems)
        self.beyond: Mapping[str, int] = {name: number for name, number in found.beyond.items() if number}
        self._numbers, self._starts, self._members = found.numbers, found.starts, found.members
        self._first_question = found.first_question
        self._keyed, self._has_ids, self._has_question_ids = found.keyed, found.has_ids, found.has_question_ids
        self._item_ids = found.item_ids
        if not len(self):
            raise no_sample(rows.path, self.problems)

    @property
    def sentence(self) -> str:
        """What was understood, for the log."""
        beyond = "".join(f", {number:,} of them with {name}" for name, number in self.beyond.items())
        n_images = len(self) - self.beyond.get("no image", 0)
        texts = "" if self._reading.has_texts else f"; {_no_texts(self._rows.columns)}"
        return f"{self._reading.sentence}{texts}; {counted(n_images, 'image')} in {counted(len(self._rows), 'row')}{beyond}"

    @property
    def item_ids(self) -> tuple[int, ...]:
        """Every id that an official result file must hold: of questions where there are some, else of images; none where a text is either."""
        return tuple(self._item_ids.tolist())

    @property
    def texts_fingerprint(self) -> str:
        """Of the file's bytes and how it is read; images do not count."""
        return hashlib.sha256(f"{self._rows.fingerprint} {self._reading.sentence}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Sample:
        """Raises IndexError, and DataError where the file is another one by now."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside of these {len(self)} samples")
        members = self._members[self._starts[index] : self._starts[index + 1]].tolist()
        parts = [self._reading.parts(self._rows[row], partial(self._rows.place, row)) for row in members]
        number, first = int(self._numbers[index]), parts[0]
        named = first.image_id
        key = str(named) if self._keyed and named is not None else _key(first.images, number)
        images = [self._image(value, members[0]) for value in first.images]
        return Sample(
            key=key,
            image_id=named if self._has_ids and isinstance(named, int) else number,
            media=images[0] if images else None,
            further=tuple(images[1:]),
            captions=tuple(caption for one in parts for caption in one.captions),
            questions=tuple(self._questions(parts, members)),
        )

    def place(self, index: int) -> str:
        """Where the sample's first row stands, for messages: `captions.jsonl, line 7`."""
        return self._rows.place(int(self._members[self._starts[index]]))

    def text_lengths(self, measure: Measure) -> NDArray[np.int64]:
        """As `multimodal.sample.TextLengths`: every row is read once."""
        return measured((self[index] for index in range(len(self))), len(self), measure)

    def _image(self, value: ImageValue, row: int) -> bytes | Path:
        return value if isinstance(value, bytes) else self._root / relative_name(value, self._root)

    def _questions(self, parts: list[Parts], members: list[int]) -> Iterator[Question]:
        for one, row in zip(parts, members, strict=True):
            for k, asked in enumerate(one.questions):
                number = (
                    one.question_id if self._has_question_ids and isinstance(one.question_id, int) else int(self._first_question[row]) + k
                )
                yield asked.numbered(number)


def _no_texts(names: tuple[str, ...]) -> str:
    return f"no column is known to hold captions or questions; it has {listed_names(names)}; name it, as in columns: {{caption: {names[-1]}}}"


def _key(images: tuple[ImageValue, ...], number: int) -> str:
    """The images' names; the sample's number where an image has none, or there is none."""
    return "+".join(value if isinstance(value, str) else str(number) for value in images) or str(number)


def relative_name(name: str, root: Path) -> str:
    """The name as it is below the folder, where it is a whole path into it; the folder may be given from the current one."""
    if not name.startswith("/"):
        return name
    root = root if root.is_absolute() else Path(os.path.abspath(root))
    return Path(name).relative_to(root).as_posix() if Path(name).is_relative_to(root) else name


class Scan:
    """What one look at all rows finds: which rows are a sample, and which cannot be used.

    numbers          int64 [samples]: the number of each sample's image, those that cannot be used counted too
    starts, members  int64 [samples + 1], int64 [rows that are used]: sample i is of the rows members[starts[i]:starts[i + 1]]
    first_question   int64 [rows]: how many questions the rows before have
    """

    def __init__(self, rows: RowFile, reading: Reading, folder: ImageFolder, root: Path) -> None:
        self._rows, self._reading, self._folder, self._root = rows, reading, folder, root
        self.problems: list[BadSample] = []
        self.beyond = dict.fromkeys(("several images", "no image", "earlier turns"), 0)
        self._known: dict[tuple[str, ...], int] = {}  # images -> their number
        self._is_there: list[bool] = []
        self._ids: dict[int | str, int] = {}
        self.keyed = self.has_ids = self.has_question_ids = True
        self.is_either = False  # an exchange of a conversation is a caption and a question
        self._question_ids: dict[int, None] = {}  # in the order of the rows
        image_of, n_questions = self._look()
        # One image may have several ids: then no id names it.
        self.keyed = self.keyed and len(self._ids) == len(self._known)
        self.has_ids = self.has_ids and self.keyed
        self._arrange(image_of, n_questions)
        self.item_ids = self._item_ids(n_questions)

    def _look(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """int64 [rows] twice: for each row the number of its image, -1 where it is not used; and how many questions it has."""
        image_of, n_questions = [], []
        for row, values in enumerate(self._rows):
            place = partial(self._rows.place, row)
            parts = self._reading.parts(values, place)
            number = self._number(parts, row, place) if parts.images or parts.is_text_only else -1
            self._note_ids(parts, number)
            n_questions.append(len(parts.questions))
            self.is_either |= bool(parts.captions and parts.questions and parts.questions[0].places is not None)
            if parts.problems:
                key = _key(parts.images, row) if parts.images else place()
                self.problems += [BadSample(key=key, reason=reason, detail=detail) for reason, detail in parts.problems]
            if number < 0:
                self.problems.append(BadSample(key=str(row), reason="no image", detail=f"{place()} names no image"))
            is_used = number >= 0 and self._is_there[number] and (parts.captions or parts.questions or not self._reading.has_texts)
            if number >= 0 and self._is_there[number] and not is_used and not parts.problems:
                self.problems.append(BadSample(key=_key(parts.images, row), reason="no text", detail=f"{place()} has no text"))
            image_of.append(number if is_used else -1)
            if is_used:
                self._note_beyond(parts)
        return np.array(image_of, dtype=np.int64), np.array(n_questions, dtype=np.int64)

    def _note_beyond(self, parts: Parts) -> None:
        self.beyond["several images"] += len(parts.images) > 1
        self.beyond["no image"] += not parts.images
        self.beyond["earlier turns"] += any(asked.turns for asked in parts.questions)

    def _number(self, parts: Parts, row: int, place: Callable[[], str]) -> int:
        """The number of a row's images; of some that were not there before, whether they are files. Bytes are a row's own, and so is no image."""
        names = tuple(value for value in parts.images if isinstance(value, str))
        is_own = len(names) < max(len(parts.images), 1)
        number = self._known.setdefault((*names, f"\0{row}") if is_own else names, len(self._known))
        if number == len(self._is_there):
            missing = [name for name in names if not self._folder.has(relative_name(name, self._root), place)]
            self._is_there.append(not missing)
            if missing:
                detail = f"{place()}: {self._root / missing[0]} is missing"
                self.problems.append(
                    BadSample(key=_key(parts.images, row), reason="missing file", detail=detail, file=Path(missing[0]).name)
                )
        return number

    def _note_ids(self, parts: Parts, number: int) -> None:
        named = parts.image_id
        if number >= 0:
            self.keyed = self.keyed and named is not None and self._ids.setdefault(named, number) == number
            self.has_ids = self.has_ids and self.keyed and isinstance(named, int)
        if parts.questions:
            known = parts.question_id
            self.has_question_ids = (
                self.has_question_ids and isinstance(known, int) and known not in self._question_ids and len(parts.questions) == 1
            )
            if self.has_question_ids and isinstance(known, int):
                self._question_ids[known] = None

    def _arrange(self, image_of: NDArray[np.int64], n_questions: NDArray[np.int64]) -> None:
        order = np.argsort(image_of, kind="stable")
        self.members = order[image_of[order] >= 0].astype(np.int64)
        self.numbers, first = np.unique(image_of[self.members], return_index=True)
        self.starts = np.append(first, len(self.members)).astype(np.int64)
        self.first_question = np.concatenate([[0], np.cumsum(n_questions)[:-1]]).astype(np.int64)

    def _item_ids(self, n_questions: NDArray[np.int64]) -> NDArray[np.int64]:
        total = int(n_questions.sum())
        if total and self.is_either:  # the task decides which
            return np.zeros(0, dtype=np.int64)
        if total:
            return np.fromiter(self._question_ids, dtype=np.int64) if self.has_question_ids else np.arange(total)
        return np.array(list(self._ids), dtype=np.int64) if self.has_ids else np.arange(len(self._known))


# ----------------------------------------
# Tables as data sets.


def open_table(path: Path, images: Path, columns: Mapping[str, str]) -> TableSource:
    """The rows of a CSV, TSV, JSONL or JSON file as samples. columns: role -> column. Raises DataError and ConfigError."""
    rows = open_rows(path)
    return TableSource(rows, choose_columns(rows, columns), images=images)


def _open(given: Given) -> TableSource:
    return open_table(given.path, given.folder, given.columns)


READER = Reader("table", "a CSV, TSV, JSONL or JSON table", lambda found: bool(found.row), _open, is_general=True, reads=("columns",))
