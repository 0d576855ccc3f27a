"""The rows of a file, read at their offsets and never all at once: JSON lines, a JSON list, CSV and TSV, in gzip too."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import mmap
import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from adalink.errors import DataError
from tasks.data.files import once

__all__ = ["BY_ID", "ID", "Row", "RowFile", "holds_json_lines", "is_row_file", "open_rows", "unpacked_suffix"]

Row = Mapping[str, object]

BY_ID = ""  # an object of rows by their ids; each row then has its own
ID = "(id)"  # under this name

_decoded = json.JSONDecoder().decode  # half the time of json.loads, which looks for the encoding first
_MOST_FIELD = 2**27  # bytes of one field of a CSV file
_PIECE = 2**26  # bytes that are looked through at once for the ends of lines
_BLANK = 16  # bytes; a line as short as this may hold nothing but spaces
_MOST_LINE = 2**24  # bytes of a first line, where it decides what a file is
_SPACE = re.compile(r"[ \t\r\n]*")
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_SEPARATORS = ",;\t|"
_DECODER = json.JSONDecoder()


class RowFile(Protocol):
    """Rows with named fields, by number. Pickles cheaply, because worker processes get a copy."""

    path: Path

    @property
    def fingerprint(self) -> str:
        """Of the file's bytes."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the first row's fields."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Row:
        """Raises DataError, with file and line, where the row is damaged."""

    def __iter__(self) -> Iterator[Row]: ...

    def place(self, number: int) -> str:
        """Where a row stands, for messages: `captions.jsonl, line 7`."""


def unpacked_suffix(path: Path) -> str:
    """`.jsonl` of `captions.jsonl.gz` and of `captions.JSONL`."""
    return Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()


def is_row_file(path: Path) -> bool:
    """Whether the name is one of a CSV, TSV, JSONL or JSON file."""
    return unpacked_suffix(path) in _KINDS


def open_rows(path: Path, inside: str | None = None) -> RowFile:
    """The rows of a CSV, TSV, JSONL or JSON file, by the ending of its name. Raises DataError where it cannot be read as that.

    inside   where a JSON file is an object: the key of its list of rows, or BY_ID where it is rows by their ids
    """
    return once((path, inside), lambda: _opened(path, inside))


def _opened(path: Path, inside: str | None) -> RowFile:
    if inside is not None:
        return _JsonObject(path, inside)
    kind = _KINDS.get(unpacked_suffix(path))
    if kind is None:
        raise DataError(f"{path} ends in {path.suffix!r}: expected one of {', '.join(_KINDS)}, or the same with .gz")
    return _JsonLines(path) if kind is _JsonList and holds_json_lines(path) else kind(path)


def holds_json_lines(path: Path) -> bool:
    """Whether the first line of a file is a whole JSON object, and more follows: so `datasets` and pandas write JSON lines into `.json` too."""
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            first, second = file.readline(_MOST_LINE), file.read(_BLANK)
        return first.endswith(b"\n") and bool(second.strip()) and isinstance(json.loads(first.decode("utf-8-sig")), dict)
    except (OSError, EOFError, ValueError, RecursionError):  # whoever reads the file says what is wrong with it
        return False


class _RowsAtOffsets:
    """Rows at offsets of a file in UTF-8.

    spans   int64 [rows, 2]: the bytes of each row, from and to
    lines   int64 [rows]: the line that each row begins at, counted from 1
    """

    spans: NDArray[np.int64]
    lines: NDArray[np.int64]

    def __init__(self, path: Path) -> None:
        self.path = path
        self._data: bytes | mmap.mmap | None = None
        data = self.data
        if bytes(data[:2]) in _UTF16:
            raise DataError(f"{path} is text in UTF-16: save it as UTF-8")
        self.fingerprint = hashlib.sha256(data).hexdigest()
        try:
            self._find(data, 3 if bytes(data[:3]) == b"\xef\xbb\xbf" else 0)
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not text in UTF-8 ({error.reason}): save it as UTF-8") from None
        if not len(self):
            raise DataError(f"{path} holds no row")

    @property
    def data(self) -> bytes | mmap.mmap:
        """The bytes of the file, mapped; unpacked into memory where it is a gzip file."""
        if self._data is None:
            self._data = _read(self.path)
        return self._data

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_data": None}

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the first row's fields."""
        return tuple(self[0])

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, number: int) -> Row:
        start, end = self.spans[number]
        return self._row(bytes(self.data[start:end]), number)

    def __iter__(self) -> Iterator[Row]:
        data = self.data
        for number, (start, end) in enumerate(self.spans.tolist()):
            yield self._row(bytes(data[start:end]), number)

    def place(self, number: int) -> str:
        """`captions.jsonl, line 7`."""
        return f"{self.path.name}, line {self.lines[number]}"

    def _find(self, data: bytes | mmap.mmap, start: int) -> None:
        """Set spans and lines; start: of the first byte of text."""
        raise NotImplementedError

    def _row(self, text: bytes, number: int) -> Row:
        """One row, of its bytes."""
        try:
            row = _decoded(text.decode())
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.place(number)}: {text[:40]!r} is not JSON ({error}); expected an object with named fields") from None
        if not isinstance(row, dict):
            raise DataError(f"{self.place(number)} is {text[:40]!r}; expected an object with named fields")
        return row


def _read(path: Path) -> bytes | mmap.mmap:
    try:
        if path.suffix.lower() == ".gz":
            return gzip.decompress(path.read_bytes())
        with path.open("rb") as file:
            if not path.stat().st_size:
                raise DataError(f"{path} holds 0 bytes")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; check the path") from None
    except (OSError, EOFError) as error:
        raise DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


class _JsonLines(_RowsAtOffsets):
    """One object a line. Empty lines are none."""

    def _find(self, data: bytes | mmap.mmap, start: int) -> None:
        found = []
        for first in range(0, len(data), _PIECE):
            found.append(np.flatnonzero(np.frombuffer(data[first : first + _PIECE], dtype=np.uint8) == ord("\n")) + first)
        ends = np.append(np.concatenate(found), len(data))
        starts = np.concatenate([[start], ends[:-1] + 1])
        is_row = ends > starts
        for number in np.flatnonzero(is_row & (ends - starts < _BLANK)):
            is_row[number] = bool(bytes(data[starts[number] : ends[number]]).strip())
        self.spans = np.stack([starts, ends], axis=1)[is_row].astype(np.int64)
        self.lines = np.flatnonzero(is_row) + 1


class _JsonList(_RowsAtOffsets):
    """A list of objects; the text is gone through once, and no object of it stays in memory."""

    def _find(self, data: bytes | mmap.mmap, start: int) -> None:
        text = str(memoryview(data)[start:], "latin-1")  # a letter is a byte, as the offsets are; a row is read as UTF-8 later
        spans: list[tuple[int, int]] = []
        try:
            self._look(text, self._after(text, 0), spans)
        except (ValueError, RecursionError) as error:
            line = error.lineno if isinstance(error, json.JSONDecodeError) else text.count("\n", 0, spans[-1][1] if spans else 0) + 1
            raise DataError(f"{self.path} is not JSON at row {len(spans)}, line {line}: {error}; is it whole?") from None
        self.spans = np.array(spans, dtype=np.int64).reshape(-1, 2) + start
        self.lines = np.arange(len(spans))

    def _look(self, text: str, at: int, spans: list[tuple[int, int]]) -> None:
        """Add the span of each row of the list that begins at a place. Raises ValueError where it is no JSON."""
        if text[at : at + 1] != "[":
            raise DataError(f"{self.path} begins with {text[at : at + 20]!r}; expected a list of objects")
        at = self._after(text, at + 1)
        while text[at : at + 1] != "]":
            _, end = _DECODER.raw_decode(text, at)
            spans.append((at, end))
            at = self._next(text, end, "]", len(spans) - 1)

    def _next(self, text: str, at: int, end: str, row: int) -> int:
        """Where the next row begins after one, or its list or object ends."""
        at = self._after(text, at)
        if text[at : at + 1] not in (",", end):
            raise DataError(f"{self.path}[{row}] is followed by {text[at : at + 20]!r}; expected a comma or the end of the list")
        return self._after(text, at + 1) if text[at] == "," else at

    def place(self, number: int) -> str:
        """`captions.json[6]`."""
        return f"{self.path.name}[{number}]"

    @staticmethod
    def _after(text: str, at: int) -> int:
        """Where the next thing begins."""
        found = _SPACE.match(text, at)
        return found.end() if found else at


class _JsonObject(_JsonList):
    """The rows in an object: those of a list under a key, or objects by their ids. inside: the key, or BY_ID."""

    def __init__(self, path: Path, inside: str) -> None:
        self._inside = inside
        super().__init__(path)

    def _look(self, text: str, at: int, spans: list[tuple[int, int]]) -> None:
        if text[at : at + 1] != "{":
            raise DataError(
                f"{self.path} begins with {text[at : at + 20]!r}; expected an object with {self._inside or 'rows by their ids'}"
            )
        at, row = self._after(text, at + 1), 0
        while text[at : at + 1] != "}":
            name, end = _DECODER.raw_decode(text, at)
            colon = self._after(text, end)
            if text[colon : colon + 1] != ":":
                raise ValueError(f"{text[at : at + 20]!r} is followed by no colon")
            value = self._after(text, colon + 1)
            if name == self._inside != BY_ID:
                return super()._look(text, value, spans)
            _, end = _DECODER.raw_decode(text, value)
            if self._inside == BY_ID:
                spans.append((at, end))
            at, row = self._next(text, end, "}", row), row + 1
        if self._inside != BY_ID:
            raise DataError(f"{self.path} has no list {self._inside!r}; is it the right file?")
        return None

    def _row(self, text: bytes, number: int) -> Row:
        if self._inside != BY_ID:
            return super()._row(text, number)
        ((name, row),) = super()._row(b"{" + text + b"}", number).items()
        if not isinstance(row, dict):
            raise DataError(f"{self.place(number)} is {str(row)[:40]!r}; expected an object with named fields")
        return {**row, ID: name}


class _Separated(_RowsAtOffsets):
    """CSV: a line of names, then fields between separators; a field in quotes may hold the ends of lines."""

    def _find(self, data: bytes | mmap.mmap, start: int) -> None:
        csv.field_size_limit(_MOST_FIELD)
        ends = [start]

        def lines() -> Iterator[str]:
            file = io.BytesIO(data) if isinstance(data, bytes) else data
            file.seek(start)
            for line in iter(file.readline, b""):
                ends.append(ends[-1] + len(line))
                yield line.decode("utf-8")

        self.separator = self._separator(bytes(data[start : start + 2**16]))
        reader = csv.reader(lines(), delimiter=self.separator, strict=True)
        try:
            self._names = self._checked_names(next(reader, []))
            found = [reader.line_num, *(reader.line_num for _ in reader)]  # lines read at the end of each row
        except csv.Error as error:
            raise DataError(f"{self.path.name}, line {reader.line_num} is not CSV: {error}") from None
        bytes_of = np.array(ends, dtype=np.int64)
        spans = ((bytes_of[first], bytes_of[last], first + 1) for first, last in pairwise(found))
        rows = [span for span in spans if bytes(data[span[0] : span[1]]).strip()]
        table = np.array(rows, dtype=np.int64).reshape(-1, 3)
        self.spans, self.lines = table[:, :2], table[:, 2]

    def _separator(self, head: bytes) -> str:
        """A tab in a TSV file; else what the line of names has most of."""
        if unpacked_suffix(self.path) == ".tsv":
            return "\t"
        first = head.split(b"\n", 1)[0].decode("utf-8", "replace")
        return max(_SEPARATORS, key=first.count)

    def _checked_names(self, fields: list[str]) -> tuple[str, ...]:
        names = tuple(name.strip() for name in fields)
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise DataError(f"{self.path.name}, line 1 has the column {twice!r} more than once; rename one of them")
        return names

    @property
    def columns(self) -> tuple[str, ...]:
        """The names in the first line."""
        return self._names

    def _row(self, text: bytes, number: int) -> Row:
        fields = next(csv.reader(io.StringIO(text.decode("utf-8"), newline=""), delimiter=self.separator))
        if len(fields) != len(self._names):
            raise DataError(
                f"{self.place(number)} has {len(fields)} fields, and the line of names has {len(self._names)}; is a quote or separator missing?"
            )
        return dict(zip(self._names, fields, strict=True))


_KINDS: Mapping[str, type[_RowsAtOffsets]] = {
    ".csv": _Separated,
    ".txt": _Separated,  # Flickr8k's captions.txt
    ".tsv": _Separated,
    ".jsonl": _JsonLines,
    ".ndjson": _JsonLines,
    ".json": _JsonList,
}
