"""What a reader of a data set is, and what is found out about a path before one is chosen."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, Protocol

from adalink.errors import ConfigError, DataError
from multimodal.data.images.format import ENDINGS
from multimodal.sample import BadSample, Sample
from tasks.data.files import annotation_document
from tasks.data.rows import ID, Row, holds_json_lines, is_row_file, open_rows, unpacked_suffix

__all__ = ["IMAGE_ENDINGS", "Found", "Given", "Official", "Reader", "ReadSource"]

_FIRST_BY_ID = re.compile(r'\s*\{\s*"[^"\\]*"\s*:\s*(?=\{)')
_MOST_NAMES = 4096  # entries of a folder that are looked at
IMAGE_ENDINGS = frozenset(f".{ending}" for ending in ENDINGS)


class ReadSource(Protocol):
    """The samples that a reader gives, as `multimodal.sample.SampleSource`, with what is known to be bad and what results must hold."""

    @property
    def problems(self) -> tuple[BadSample, ...]:
        """What the data set names and cannot give."""

    @property
    def item_ids(self) -> tuple[int, ...]:
        """Every id that an official result file must hold; empty where only the samples say it."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


@dataclass(frozen=True, kw_only=True)
class Official:
    """The layout of a benchmark's own result file: the names of its two fields, and what it calls each item of a run."""

    id_name: str
    text_name: str
    ids: Mapping[int, int | str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Given:
    """What a config says about a data set that is named by its path.

    images    the folder of images; None: where the file lies
    columns   role -> column, for tables
    cache     the folder of unpacked copies; None: the user's
    in_order  samples are read once, in the order of the files, so that no unpacked copy is worth its room
    """

    path: Path
    images: Path | None = None
    annotations: Path | None = None
    image_name: str | None = None
    split: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    cache: Path | None = None
    in_order: bool = False

    @property
    def folder(self) -> Path:
        """The folder of images."""
        return self.images or (self.path if self.path.is_dir() else self.path.parent)


@dataclass(frozen=True)
class Reader:
    """One format of data set: how it is recognised and opened. Adding one is one file with a READER, and its name in `tasks.data.readers`.

    name         what `format` calls it
    about        what it is, for messages and help
    recognises   whether a path is of this format
    open         its samples; raises DataError and ConfigError
    is_general   it takes what no other reader recognises
    reads        which of `annotations`, `image_name`, `split` and `columns` it reads; a config that gives another one is refused
    """

    name: str
    about: str
    recognises: Callable[[Found], bool]
    open: Callable[[Given], ReadSource]
    is_general: bool = False
    reads: tuple[str, ...] = ()

    def opened(self, given: Given) -> ReadSource:
        """Its samples. Raises ConfigError where a setting would not be read, and DataError and ConfigError as `open` does."""
        unread = [name for name in ("annotations", "image_name", "split", "columns") if getattr(given, name) and name not in self.reads]
        if unread:
            advice = "; give each split as a path of its own" if unread == ["split"] else ""
            raise ConfigError(f"{given.path} is read as {self.about}, and {', '.join(unread)} would not be read: leave it out{advice}")
        return self.open(given)


class Found:
    """What a path shows of itself: the names in a folder, the first row of a table, the keys of a JSON object. Each is read when asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_folder = path.is_dir()
        self.suffix = "" if self.is_folder else unpacked_suffix(path)

    @cached_property
    def names(self) -> frozenset[str]:
        """The names of what lies in a folder; of a file none."""
        if not self.is_folder:
            return frozenset()
        return frozenset(entry.name for entry, _ in zip(self.path.iterdir(), range(_MOST_NAMES), strict=False))

    @cached_property
    def suffixes(self) -> frozenset[str]:
        """The endings of the files in a folder, in lower case, without .gz."""
        return frozenset(unpacked_suffix(Path(name)) for name in self.names)

    @property
    def has_images(self) -> bool:
        """Whether a folder holds image files."""
        return bool(self.suffixes & IMAGE_ENDINGS)

    @cached_property
    def document(self) -> Mapping[str, object]:
        """A JSON file's object; empty for a list, rows by their ids, and for every other file. Raises DataError where it is no JSON."""
        if self.suffix != ".json" or self._holds_rows or self.by_id:
            return {}
        found = annotation_document(self.path)
        return found if isinstance(found, dict) else {}

    @cached_property
    def row(self) -> Row:
        """The first row of a table; empty where the file is none. Raises DataError where it is damaged."""
        if self.is_folder or not is_row_file(self.path) or (self.suffix == ".json" and not self._holds_rows):
            return {}
        return self._first_row

    @cached_property
    def by_id(self) -> Row:
        """The first of the questions that a JSON file's object holds by their ids; empty where it holds others."""
        if self.suffix != ".json":
            return {}
        start = _FIRST_BY_ID.match(head := self._head())
        try:
            first, _ = json.JSONDecoder().raw_decode(head, start.end()) if start else ({}, 0)
        except ValueError:
            return {}
        return {**first, ID: ""} if "question" in first else {}

    @cached_property
    def _holds_rows(self) -> bool:
        """Whether a JSON file is a list, or an object a line."""
        with self._opened() as file:
            return file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"[" or holds_json_lines(self.path)

    @cached_property
    def _first_row(self) -> Row:
        """Of a list of objects the first alone, without a look at the rest."""
        if self.suffix == ".json" and self.path.suffix.lower() != ".gz":
            head = self._head()
            try:
                first, _ = json.JSONDecoder().raw_decode(head, head.index("{"))
                return first if isinstance(first, dict) else {}
            except ValueError:
                pass  # a first row that is longer, or damaged: reading says which
        return open_rows(self.path)[0]

    def _head(self) -> str:
        """The first MiB of a file."""
        with self._opened() as file:
            return file.read(2**20).decode("utf-8-sig", "replace")

    @contextmanager
    def _opened(self) -> Iterator[BinaryIO | gzip.GzipFile]:
        try:
            with self.path.open("rb") as file:
                yield gzip.GzipFile(fileobj=file) if self.path.suffix.lower() == ".gz" else file
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror or error}") from None
