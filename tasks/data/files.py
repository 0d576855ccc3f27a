"""Annotation files of COCO's kind: a JSON object that holds lists of rows, read with errors that say what was found."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path, PurePosixPath
from string import Formatter
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from adalink.errors import ConfigError, DataError
from multimodal.sample import BadSample, Measure, Sample, counted, measured

__all__ = [
    "FileSource", "ImageFolder", "ImageName", "Rows", "annotation_document", "answer_marks", "document_keys", "first_has", "integer", "loaded_once",
    "no_sample", "once", "read_annotation_file", "read_lines", "text", "text_lines",
]  # fmt: skip


class Rows:
    """One list of an annotation file; its fields are checked as they are read.

    where   file and list, for messages: `captions.json: annotations`
    """

    def __init__(self, where: str, rows: list[object]) -> None:
        self.where = where
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[tuple[str, Mapping[str, object]]]:
        """Each row with its name for messages, such as `captions.json: annotations[3]`."""
        for index, row in enumerate(self._rows):
            name = f"{self.where}[{index}]"
            if not isinstance(row, dict):
                raise DataError(f"{name} is {_displayed(row)}; expected an object with named fields")
            yield name, row


def read_annotation_file(path: Path, *keys: str) -> tuple[Mapping[str, object], tuple[Rows, ...]]:
    """The whole document and its lists under `keys`.

    Raises DataError where the file is missing, is no JSON, is no object, or lacks one of the lists.
    """
    document = annotation_document(path)
    if not isinstance(document, dict):
        raise DataError(f"{path} holds {_displayed(document)}; expected a JSON object with the lists {_listed(keys)}")
    lists = []
    for key in keys:
        if key not in document:
            raise DataError(f"{path} has no list {key!r}; it has {_listed(document)}; is it the right file?")
        rows = document[key]
        if not isinstance(rows, list):
            raise DataError(f"{path}: {key!r} is {_displayed(rows)}; expected a list")
        lists.append(Rows(f"{path}: {key}", rows))
    return document, tuple(lists)


def integer(row: Mapping[str, object], key: str, name: str) -> int:
    """The whole number under `key`; raises DataError where it is absent or something else (a text of digits too)."""
    value = _value(row, key, name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise DataError(f"{name}: {key!r} is {_displayed(value)}; expected a whole number")
    return value


def text(row: Mapping[str, object], key: str, name: str) -> str:
    """The text under `key`, as it stands; raises DataError as `integer` does."""
    value = _value(row, key, name)
    if not isinstance(value, str):
        raise DataError(f"{name}: {key!r} is {_displayed(value)}; expected a text")
    if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise DataError(f"{name}: {key!r} is {_displayed(value)}, which holds half of a surrogate pair; expected Unicode text")
    return value


def answer_marks(records: Sequence[object]) -> tuple[str, ...]:
    """What each of the people's answers to a question holds beside the answer itself, where two whole records could be equal; else nothing.

    The official VQA script compares whole records, so it takes equal ones as one.
    """
    found = [record for record in records if isinstance(record, dict)]
    if len({str(record.get("answer_id")) for record in found if "answer_id" in record}) == len(found):
        return ()
    rest = [{key: value for key, value in record.items() if key != "answer"} for record in found]
    return tuple(json.dumps(fields, sort_keys=True) for fields in rest)


def _value(row: Mapping[str, object], key: str, name: str) -> object:
    if key not in row:
        raise DataError(f"{name} has no {key!r}; it has {_listed(row)}")
    return row[key]


T = TypeVar("T")
_shared: list[dict[object, Any]] = []  # what was loaded within each `loaded_once`, the innermost last


@contextmanager
def loaded_once() -> Iterator[None]:
    """Within it a file is loaded once, by whoever asks first: to recognise it, then to read it."""
    _shared.append({})
    try:
        yield
    finally:
        _shared.pop()


def once(what: object, load: Callable[[], T]) -> T:
    """What `load` gives; within `loaded_once`, what it gave the first time for the same thing."""
    known = _shared[-1] if _shared else {}
    if what not in known:
        known[what] = load()
    return known[what]  # type: ignore[no-any-return]  # of the type that is loaded


def annotation_document(path: Path) -> object:
    """What a JSON file holds, in gzip too. Raises DataError where it is missing or none."""
    return once(path, lambda: _load(path))


def _load(path: Path) -> object:
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            return json.load(file)
    except FileNotFoundError as error:
        raise DataError(f"the annotation file {path} does not exist; check the path") from error
    except (OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"the annotation file {path} cannot be read: {reason}; expected a JSON file") from error
    except (ValueError, RecursionError) as error:  # ValueError: JSON and UTF-8 both
        raise DataError(f"{path} is not JSON: {error}; is it whole, and unpacked?") from error


def document_keys(path: Path) -> list[str]:
    """The names in an annotation file's object; raises DataError as `read_annotation_file` does."""
    document = annotation_document(path)
    return list(document) if isinstance(document, dict) else []


def first_has(rows: object, key: str) -> bool:
    """Whether these are rows of which the first has the field."""
    return isinstance(rows, list) and bool(rows) and isinstance(rows[0], dict) and key in rows[0]


def _displayed(value: object) -> str:
    displayed = repr(value)
    return f"{displayed[:60]}{'...' if len(displayed) > 60 else ''} ({type(value).__name__})"


def _listed(names: Iterable[object]) -> str:
    listed = [repr(name) for name in names]
    return ", ".join(listed[:10]) + (", ..." if len(listed) > 10 else "") if listed else "nothing"


# ----------------------------------------
# A data set that lies in files: its samples in memory, its images on disk.


def no_sample(read_from: Path, problems: Sequence[BadSample]) -> DataError:
    """The error of a data set of which nothing can be used; where all images are missing, with the setting that says where they are."""
    first = f"; {counted(len(problems), 'sample')} cannot be used, the first because {problems[0].detail}" if problems else ""
    advice = ": give images, the folder of images, if they are elsewhere" if problems and {bad.reason for bad in problems} == {"missing file"} else ""
    return DataError(f"{read_from} gives no sample{first}{advice}")


class FileSource:
    """Samples whose images are paths, in the order of the annotations; nothing is decoded here.

    problems   what the annotations name and the data set cannot give: images that are not there, images without a text.
    item_ids   every id that an official result file for this split must hold, in the file's order: of images, or of questions. Those
               that `problems` keep from being asked about are among them.
    """

    def __init__(self, samples: Iterable[Sample], problems: Iterable[BadSample], *, read_from: Path, item_ids: Iterable[int] = ()) -> None:
        """Raises DataError where no sample is left; `read_from` is the annotation file, for the message."""
        self._samples = tuple(samples)
        self.problems = tuple(problems)
        self.item_ids = tuple(item_ids)
        if not self._samples:
            raise no_sample(read_from, self.problems)

    @cached_property
    def texts_fingerprint(self) -> str:
        """Of keys, ids and all texts; images do not count, and neither does the folder in which they lie."""
        digest = hashlib.sha256()
        for sample in self._samples:
            words = [sample.key, str(sample.image_id), *sample.captions]
            for asked in sample.questions:
                words += [
                    f"{asked.question_id} {len(asked.answers)}",
                    asked.text,
                    *([asked.pair] if asked.pair else []),
                    asked.question_type,
                    asked.answer_type,
                    *asked.answers,
                    *asked.marks,
                ]
            words.append(f"{len(sample.captions)} {len(sample.questions)}")
            digest.update("".join(f"{len(word)} {word}\n" for word in words).encode("utf-8", "backslashreplace"))
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        return self._samples[index]

    def text_lengths(self, measure: Measure) -> NDArray[np.int64]:
        """As `multimodal.sample.TextLengths`: all texts are in memory."""
        return measured(self._samples, len(self), measure)


# ----------------------------------------
# The image files that annotations name: found by one listing of each folder, never by one question per file.


class ImageName:
    """A file name with the image's id in it, such as `COCO_val2014_{image_id:012d}.jpg`.

    Raises ConfigError where the pattern has another field, none, or a format that a whole number does not have.
    """

    def __init__(self, pattern: str) -> None:
        try:
            fields = [field for _, field, _, _ in Formatter().parse(pattern) if field is not None]
            if fields and set(fields) == {"image_id"}:
                pattern.format(image_id=1)
        except (ValueError, KeyError, IndexError) as error:
            raise ConfigError(f"the image name pattern {pattern!r} cannot be used: {error}; {_EXAMPLES}") from error
        unknown = sorted(set(fields) - {"image_id"})
        if unknown:
            raise ConfigError(f"the image name pattern {pattern!r} has the unknown field {unknown[0]!r}; {_EXAMPLES}")
        if not fields:
            raise ConfigError(f"the image name pattern {pattern!r} has no field, so all images would have one name; {_EXAMPLES}")
        self._pattern = pattern

    def __call__(self, image_id: int) -> str:
        """Such as `COCO_val2014_000000000042.jpg`."""
        return self._pattern.format(image_id=image_id)


_PLAIN = re.compile(r"(?:\w[\w.-]*/)*\w[\w.-]*", re.ASCII)  # names that need no closer look

_EXAMPLES = "the only field is image_id, as in COCO_val2014_{image_id:012d}.jpg or image{image_id}.jpg"


class ImageFolder:
    """A folder of images, which may have folders in it; raises DataError where it is none."""

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            found = "is a file" if root.exists() else "does not exist"
            raise DataError(f"the images folder {root} {found}; expected a folder of images")
        self._root = root
        self._listed: dict[str, frozenset[str]] = {}

    def find(self, name: str, where: str) -> Path | None:
        """The path of the image called `name` (`a.jpg` or `train/a.jpg`), None where there is no such file.

        Raises DataError where the name would leave the folder; `where` is the row that holds it, for the message.
        """
        return self._root / name if self.has(name, lambda: where) else None

    def has(self, name: str, where: Callable[[], str]) -> bool:
        """Whether there is a file called `name`. Raises DataError as `find` does."""
        if _PLAIN.fullmatch(name):
            parent, _, last = name.rpartition("/")
        else:
            parts = PurePosixPath(name).parts
            if not parts or ".." in parts or parts[0] == "/" or "\0" in name or "\\" in name:
                advice = "; write / between folders, not \\" if "\\" in name else ""
                raise DataError(f"{where()} names the image {name!r}; expected a file name inside the images folder {self._root}{advice}")
            parent, last = "/".join(parts[:-1]), parts[-1]
        return last in self.names(parent)

    def names(self, folder: str) -> frozenset[str]:
        """The names in a folder below, or in this one where `folder` is empty; listed once."""
        if folder not in self._listed:
            self._listed[folder] = _names(self._root / folder)
        return self._listed[folder]


def _names(folder: Path) -> frozenset[str]:
    try:
        with os.scandir(folder) as entries:
            return frozenset(entry.name for entry in entries)
    except FileNotFoundError:
        return frozenset()
    except OSError as error:
        raise DataError(f"the images folder {folder} cannot be listed: {error.strerror}") from error


# ----------------------------------------
# The lines of a text that people wrote: one caption, prompt or key a line.


_END = re.compile("\r\n|\n|\r")


def text_lines(text: str) -> list[str]:
    """The lines that are not blank, without the white space around them.

    A line ends at LF, CR LF or CR alone, as in Python's text files. `str.splitlines` also ends it at what Unicode calls a line boundary
    (vertical tab, form feed, U+0085, U+2028 and others): texts copied from a web page hold these inside a sentence.
    """
    return [stripped for line in _END.split(text) if (stripped := line.strip())]


def read_lines(path: Path, what: str) -> list[str]:
    """The lines of a text file that are not blank, each a `what`. Raises ConfigError where it cannot be read."""
    try:
        return text_lines(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the {what}s {path} cannot be read ({error}): give a text file in UTF-8, one {what} a line") from None
