"""Annotation files of COCO's kind: a JSON object that holds lists of rows, read with errors that say what was found."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from adalink.errors import DataError

__all__ = ["Rows", "answer_marks", "integer", "read_annotation_file", "text"]


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
                raise DataError(f"{name} is {_shown(row)}; expected an object with named fields")
            yield name, row


def read_annotation_file(path: Path, *keys: str) -> tuple[Mapping[str, object], tuple[Rows, ...]]:
    """The whole document and its lists under `keys`.

    Raises DataError where the file is missing, is no JSON, is no object, or lacks one of the lists.
    """
    document = _load(path)
    if not isinstance(document, dict):
        raise DataError(f"{path} holds {_shown(document)}; expected a JSON object with the lists {_listed(keys)}")
    lists = []
    for key in keys:
        if key not in document:
            raise DataError(f"{path} has no list {key!r}; it has {_listed(document)}; is it the right file?")
        rows = document[key]
        if not isinstance(rows, list):
            raise DataError(f"{path}: {key!r} is {_shown(rows)}; expected a list")
        lists.append(Rows(f"{path}: {key}", rows))
    return document, tuple(lists)


def integer(row: Mapping[str, object], key: str, name: str) -> int:
    """The whole number under `key`; raises DataError where it is absent or something else (a text of digits too)."""
    value = _value(row, key, name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise DataError(f"{name}: {key!r} is {_shown(value)}; expected a whole number")
    return value


def text(row: Mapping[str, object], key: str, name: str) -> str:
    """The text under `key`, as it stands; raises DataError as `integer` does."""
    value = _value(row, key, name)
    if not isinstance(value, str):
        raise DataError(f"{name}: {key!r} is {_shown(value)}; expected a text")
    if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise DataError(f"{name}: {key!r} is {_shown(value)}, which holds half of a surrogate pair; expected Unicode text")
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


def _load(path: Path) -> object:
    try:
        with path.open("rb") as file:
            return json.load(file)
    except FileNotFoundError as error:
        raise DataError(f"the annotation file {path} does not exist; check the path") from error
    except OSError as error:
        raise DataError(f"the annotation file {path} cannot be read: {error.strerror}; expected a JSON file") from error
    except (ValueError, RecursionError) as error:  # ValueError: JSON and UTF-8 both
        raise DataError(f"{path} is not JSON: {error}; is it whole, and unpacked?") from error


def _shown(value: object) -> str:
    shown = repr(value)
    return f"{shown[:60]}{'...' if len(shown) > 60 else ''} ({type(value).__name__})"


def _listed(names: Iterable[object]) -> str:
    listed = [repr(name) for name in names]
    return ", ".join(listed[:10]) + (", ..." if len(listed) > 10 else "") if listed else "nothing"
