"""Parquet and Arrow as data sets: a file, a folder of them with splits, what `datasets` saves to disk, and data sets of the Hub by name."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adalink.errors import ConfigError, DataError
from multimodal.progress import progress
from multimodal.sample import BadSample, DamagedSample, Measure, Question, Sample, counted
from tasks.data.arrow.rows import ENDINGS, HELD, ArrowRows, has_bytes, import_arrow, is_list
from tasks.data.arrow.write import LAYOUT, sample_of, unpack
from tasks.data.columns import Columns, Parts, Reading, choose_columns, id_of
from tasks.data.conversations import conversations_of
from tasks.data.reader import Found, Given, Reader, ReadSource
from tasks.data.table import Scan, TableSource, relative_name

__all__ = ["HUB", "READER", "RowSource", "files_of", "hub_files", "is_hub_name", "open_arrow"]


_LEAVES = re.compile(r"^/|(^|/)\.\.(/|$)|\\|\x00")  # in the name of an image: what may not be below the folder


class RowSource:
    """Samples that are rows with their images in them: a row is a sample, and none is looked at when the data set is opened.

    The key is the file's name and the row's number in it. Ids are those of the columns where the first row has whole numbers there; else rows,
    and questions, are counted from 0.

    problems   none: a row that cannot be used raises DamagedSample when it is read
    item_ids   none: only the samples themselves say what results must hold
    """

    problems: tuple[BadSample, ...] = ()
    item_ids: tuple[int, ...] = ()

    def __init__(self, rows: ArrowRows, reading: Reading | None, *, images: Path) -> None:
        """reading: None where the rows are those of `write_parquet`. images: where a row's image lies that has only a name."""
        self._rows, self._reading, self._images = rows, reading, images
        first = None if reading is None else reading.parts(rows.first, partial(rows.place, 0))
        self._has_ids = first is not None and isinstance(first.image_id, int)
        self._has_question_ids = first is not None and isinstance(first.question_id, int)
        self._stems = [file.stem for file in rows.files]
        if len(set(self._stems)) < len(self._stems):
            root = os.path.commonpath(rows.files)
            self._stems = [file.relative_to(root).with_suffix("").as_posix() for file in rows.files]

    @property
    def sentence(self) -> str:
        """What was understood, for the log."""
        understood = "samples as `adalink shards to` writes them" if self._reading is None else self._reading.sentence
        copy = self._rows.copy_folder
        unpacked = f", read from an unpacked copy in {copy}" if copy is not None else ""
        return f"{understood}; {counted(len(self), 'row')} with their images in {counted(len(self._rows.files), 'file')}{unpacked}"

    @property
    def fingerprint(self) -> str:
        """Of the files' sizes and parts of them, see `ArrowRows.fingerprint`, and how they are read."""
        return f"{self._rows.fingerprint} {'' if self._reading is None else self._reading.sentence}".strip()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        """Raises IndexError, and DamagedSample for a row that is damaged, without an image, or without a text."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside of these {len(self)} samples")
        try:
            return self._sample(self._rows[index], index)
        except DataError as error:
            raise error if isinstance(error, DamagedSample) else self._damaged(index, "damaged row", str(error)) from error

    def place(self, index: int) -> str:
        """The sample's file and row, for messages."""
        return self._rows.place(index)

    def text_lengths(self, measure: Measure) -> NDArray[np.int64]:
        """As `multimodal.sample.TextLengths`: the texts of every row are read once, without the bytes of the images; 0 for a row that is damaged."""

        def length(index: int, row: Mapping[str, object]) -> int:
            try:
                return measure(self._sample(row, index))
            except DataError:
                return 0

        rows = progress(enumerate(self._rows.without_bytes()), "measuring the texts", len(self))
        return np.fromiter((length(index, row) for index, row in rows), dtype=np.int64, count=len(self))

    def _damaged(self, index: int, reason: str, detail: str) -> DamagedSample:
        return DamagedSample(BadSample(key=self._key(index), reason=reason, detail=detail))

    def _key(self, index: int) -> str:
        file, row = self._rows.position(index)
        return f"{self._stems[file]}:{row}"

    def _sample(self, row: Mapping[str, object], index: int) -> Sample:
        if self._reading is None:
            return sample_of(row)
        place = partial(self._rows.place, index)
        parts = self._reading.parts(row, place)
        if not parts.images and not parts.is_text_only:
            reason, detail = parts.problems[0] if parts.problems else ("no image", f"{place()} has no image")
            raise self._damaged(index, reason, detail)
        if self._reading.has_texts and not (parts.captions or parts.questions):
            reason, detail = parts.problems[0] if parts.problems else ("no text", f"{place()} has no text")
            raise self._damaged(index, reason, detail)
        images = [image if isinstance(image, bytes) else self._named(image, index) for image in parts.images]
        return Sample(
            key=self._key(index),
            image_id=parts.image_id if self._has_ids and isinstance(parts.image_id, int) else index,
            media=images[0] if images else None,
            further=tuple(images[1:]),
            captions=parts.captions,
            questions=tuple(self._questions(parts, index)),
        )

    def _named(self, image: str, index: int) -> Path:
        name = relative_name(image, self._images)
        if re.search(_LEAVES, name):
            expected = f"expected a file name inside the images folder {self._images}"
            raise self._damaged(index, "bad file name", f"{self._rows.place(index)} names the image {name!r}; {expected}")
        return self._images / name

    def _questions(self, parts: Parts, index: int) -> Iterator[Question]:
        for k, asked in enumerate(parts.questions):
            is_named = self._has_question_ids and isinstance(parts.question_id, int) and len(parts.questions) == 1
            yield asked.numbered(parts.question_id if is_named and isinstance(parts.question_id, int) else index + k * len(self))


# ----------------------------------------
# Rows as a data set: with the images in them, or with names of images.

_FIRST_ROWS = 16  # of which one with the bytes of an image says that they are in the rows


def open_arrow(path: Path, files: Sequence[Path], given: Given) -> RowSource | TableSource:
    """Parquet or Arrow files as one data set. given: columns, the folder of images, and the cache. Raises DataError and ConfigError."""
    rows = ArrowRows(path, files)
    is_own = LAYOUT in (rows.schema.metadata or {})
    reading = None if is_own else _reading(rows, given)
    looked_at = set(getattr(reading, "roles", {}).values()) or set(rows.columns)
    columns = [name for name in rows.columns if name in looked_at]
    with_bytes = [name for name in columns if has_bytes(rows.schema.field(name).type)]
    rows = rows.only(columns)
    first = islice(rows.batches(with_bytes, rows=1), _FIRST_ROWS) if with_bytes else ()
    if reading is not None and not any(_bytes_in(batch.to_pylist()) for batch in first):
        return TableSource(rows, reading, images=given.folder, scan=ColumnScan if isinstance(reading, Columns) else None)
    return RowSource(_quick(rows, given), reading, images=given.folder)


def _reading(rows: ArrowRows, given: Given) -> Reading:
    roles = given.columns.keys() - {"conversations", "messages", "image", "images", "system"}
    conversations = None if roles else conversations_of(rows.first, given.columns)
    return conversations or choose_columns(rows, _with_image(rows, given.columns))


def _quick(rows: ArrowRows, given: Given) -> ArrowRows:
    """The rows, of an unpacked copy where a process cannot keep those decoded that it will read again."""
    needed = 0 if rows.is_mapped else rows.largest_block_bytes if given.in_order else rows.decoded_bytes
    if needed <= HELD:
        return rows
    folder = given.cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "adalink", "unpacked")
    return rows.only(rows.columns, read_from=unpack(rows, folder, rows.columns))


def _with_image(rows: ArrowRows, columns: Mapping[str, str]) -> Mapping[str, str]:
    """The columns that are given, and the only one that holds bytes as the image where none is called as usual."""
    heavy = [name for name in rows.columns if has_bytes(rows.schema.field(name).type)]
    usual = {"image", "images", "file_name", "filename", "img"} & {name.lower() for name in rows.columns}
    return {**columns, "image": heavy[0]} if len(heavy) == 1 and not usual and not {"image", "images"} & set(columns) else columns


def _bytes_in(value: object) -> bool:
    if isinstance(value, Mapping):
        return any(map(_bytes_in, value.values()))
    return any(map(_bytes_in, value)) if isinstance(value, list) else bool(value) and isinstance(value, bytes)


# ----------------------------------------
# Rows about one image, found by whole columns: a row in a million is looked at by itself.

_TEXT = r"^[^\[\x00-\x20]"  # of a text without the spaces around it: there is some, and no list in JSON
_ODD = r"^/|^\.|//|/\.|\\|\x00|\.\."  # in the name of a file: what is not below the folder, or has another spelling
_MOST_OTHERS = 0.05  # of all rows: with more, every row is looked at


class ColumnScan(Scan):
    """As `Scan` finds them, for names of images with texts: what is plain in its column is not made a row of."""

    _ids_of_columns: NDArray[np.int64] | None = None

    def _look(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        assert isinstance(self._rows, ArrowRows)
        assert isinstance(self._reading, Columns)
        compute, roles = import_arrow().compute, self._reading.roles
        names, plain, asked = [], [], []
        others: dict[str, list[Any]] = {role: [] for role in ("image_id", "question_id") if role in roles}
        for batch in self._rows.batches([column for role, column in roles.items() if role not in ("answers", "question_type", "answer_type")]):
            found = _names_in(batch.column(roles["image"]))
            if found is None or compute.any(compute.match_substring_regex(found, r"^\s*\[")).as_py():
                return super()._look()
            names.append(found.dictionary_encode())
            has_caption, no_caption, has_question, no_question = (
                part for role in ("caption", "question") for part in _texts_in(batch, roles.get(role))
            )
            is_plain = (has_caption | no_caption) & (has_question | no_question) & (has_caption | has_question | (not self._reading.has_texts))
            plain.append(is_plain & found.is_valid().to_numpy(zero_copy_only=False))
            asked.append(has_question)
            for role, values in others.items():
                values.append(batch.column(roles[role]))
        is_plain, n_questions = np.concatenate(plain), np.concatenate(asked).astype(np.int64)
        if (~is_plain).sum() > max(_MOST_OTHERS * len(is_plain), 1000):
            return super()._look()
        encoded = import_arrow().chunked_array(names).unify_dictionaries()
        images = np.concatenate([chunk.indices.fill_null(-1).to_numpy() for chunk in encoded.chunks]).astype(np.int64)
        is_there = self._files(encoded.chunk(0).dictionary, images)
        used = np.where((images >= 0) & is_there[images] & is_plain, images, -1) if len(is_there) else np.full(len(images), -1)
        for row in np.flatnonzero(~is_plain).tolist():
            used[row], n_questions[row] = self._other(row, int(images[row]), is_there)
        self.problems = [bad for _, bad in sorted(self._found, key=lambda one: one[0])]
        self._note_columns(images, n_questions, {role: import_arrow().chunked_array(values) for role, values in others.items()})
        return used, n_questions

    def _files(self, names: Any, images: NDArray[np.int64]) -> NDArray[np.bool_]:
        """bool [images]: whether each is a file; notes those that are not, at their first rows."""
        compute = import_arrow().compute
        first = np.zeros(len(names), dtype=np.int64)
        rows = np.flatnonzero(images >= 0)
        first[images[rows[::-1]]] = rows[::-1]
        folders = compute.unique(compute.replace_substring_regex(names, r"[^/]*$", "")).to_pylist()
        known = [f"{folder}{name}" for folder in folders if not re.search(_ODD, folder) for name in self._folder.names(folder.rstrip("/"))]
        is_there = compute.is_in(names, import_arrow().array(known, names.type)).to_numpy(zero_copy_only=False).copy()
        is_odd = compute.match_substring_regex(names, _ODD).to_numpy(zero_copy_only=False)
        self._found: list[tuple[int, BadSample]] = []
        for number in np.flatnonzero(~is_there | is_odd).tolist():
            name, row = names[number].as_py(), int(first[number])
            place = partial(self._rows.place, row)
            is_there[number] = self._folder.has(relative_name(name, self._root), place)
            if not is_there[number]:
                detail = f"{place()}: {self._root / name} is missing"
                self._found.append((row, BadSample(key=name, reason="missing file", detail=detail, file=Path(name).name)))
        return is_there

    def _other(self, row: int, image: int, is_there: NDArray[np.bool_]) -> tuple[int, int]:
        """The image of a row that is not plain, -1 where the row cannot be used, and how many questions it has; notes what is wrong with it."""
        place = partial(self._rows.place, row)
        parts = self._reading.parts(self._rows[row], place)
        key = "+".join(map(str, parts.images)) or place()
        bad = [BadSample(key=key, reason=reason, detail=detail) for reason, detail in parts.problems]
        if image < 0:
            bad.append(BadSample(key=str(row), reason="no image", detail=f"{place()} names no image"))
        elif is_there[image] and not bad and not parts.captions and not parts.questions and self._reading.has_texts:
            bad.append(BadSample(key=key, reason="no text", detail=f"{place()} has no text"))
        self._found += [(row, one) for one in bad]
        is_used = image >= 0 and is_there[image] and (parts.captions or parts.questions or not self._reading.has_texts)
        return (image if is_used else -1), len(parts.questions)

    def _note_columns(self, images: NDArray[np.int64], n_questions: NDArray[np.int64], columns: Mapping[str, Any]) -> None:
        """Which ids can be used, and those that results must hold."""
        n = int(images.max(initial=-1)) + 1
        codes, values, is_int = _ids_in(columns.get("image_id"), len(images))
        with_image = np.flatnonzero(images >= 0)
        of_image = np.zeros(n, dtype=np.int64)
        of_image[images[with_image[::-1]]] = codes[with_image[::-1]]
        is_same = bool((codes[with_image] >= 0).all() and (of_image[images[with_image]] == codes[with_image]).all())
        self.keyed = is_same and len(np.unique(of_image)) == n
        self.has_ids = self.keyed and is_int
        ids = values[of_image] if self.has_ids else np.arange(n)
        codes, values, is_int = _ids_in(columns.get("question_id"), len(images))
        asked = codes[n_questions > 0]
        self.has_question_ids = is_int and bool((asked >= 0).all() and (n_questions <= 1).all() and np.bincount(asked, minlength=1).max() <= 1)
        total = int(n_questions.sum())
        self._ids_of_columns = (values[asked] if self.has_question_ids else np.arange(total)) if total else ids

    def _item_ids(self, n_questions: NDArray[np.int64]) -> NDArray[np.int64]:
        return super()._item_ids(n_questions) if self._ids_of_columns is None else self._ids_of_columns


def _names_in(column: Any) -> Any:
    """The names of images of a column, null where there is none; None where the column holds other things too."""
    arrow = import_arrow()
    if arrow.types.is_struct(column.type):
        fields = {column.type.field(k).name: column.field(k) for k in range(column.type.num_fields)}
        if "path" not in fields or fields.get("bytes", column).null_count < len(column):
            return None
        column = fields["path"]
    if not (arrow.types.is_string(column.type) or arrow.types.is_large_string(column.type)):
        return None
    return arrow.compute.if_else(arrow.compute.equal(column, ""), None, column)


def _texts_in(batch: Any, column: str | None) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """bool [rows] twice: where a column has plain texts, and where it has none; neither where only the row can say it."""
    arrow = import_arrow()
    if column is None:
        return np.zeros(batch.num_rows, dtype=bool), np.ones(batch.num_rows, dtype=bool)
    values = batch.column(column)
    is_null = values.is_null().to_numpy(zero_copy_only=False)
    if arrow.types.is_string(values.type) or arrow.types.is_large_string(values.type):
        return _is_text(values), is_null
    if is_list(values.type) and arrow.types.is_string(values.type.value_type) and not arrow.types.is_fixed_size_list(values.type):
        offsets = values.offsets.to_numpy()
        counts = np.concatenate([[0], np.cumsum(_is_text(values.values))])
        n_plain, n = counts[offsets[1:]] - counts[offsets[:-1]], np.diff(offsets)
        return (n_plain == n) & (n > 0) & ~is_null, is_null
    return np.zeros(batch.num_rows, dtype=bool), is_null


def _is_text(values: Any) -> NDArray[np.bool_]:
    compute = import_arrow().compute
    found = compute.match_substring_regex(compute.utf8_trim_whitespace(values), _TEXT)
    plain: NDArray[np.bool_] = found.fill_null(False).to_numpy(zero_copy_only=False)
    return plain


def _ids_in(column: Any, rows: int) -> tuple[NDArray[np.int64], NDArray[np.int64], bool]:
    """For each row the number of its id, -1 where it has none; the ids, where all are whole numbers; and whether they are."""
    if column is None:
        return np.full(rows, -1), np.empty(0, dtype=np.int64), False
    encoded = column.combine_chunks().dictionary_encode()
    chunks = getattr(encoded, "chunks", [encoded])
    codes = np.concatenate([chunk.indices.fill_null(-1).to_numpy() for chunk in chunks]).astype(np.int64)
    values = chunks[0].dictionary
    if import_arrow().types.is_integer(values.type):
        return codes, values.cast("int64").to_numpy(), True
    known: dict[int | str | None, int] = {}
    numbers = np.array([known.setdefault(id_of(value), len(known)) if id_of(value) is not None else -1 for value in values.to_pylist()] + [-1])
    is_int = all(isinstance(one, int) for one in known)
    return numbers[codes], np.array(list(known) if is_int else [], dtype=np.int64), is_int


# ----------------------------------------
# Which files are a data set, and of which split.

_SHARD = re.compile(r"(.+?)-\d+-of-\d+.*")
_KEYWORDS = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
_MOST_ENTRIES = 1024  # of a folder that are looked at
_SAVED, _SAVED_SPLITS = "state.json", "dataset_dict.json"  # of `save_to_disk`


def _open(given: Given) -> ReadSource:
    return open_arrow(given.path, files_of(given.path, given.split), given)


def files_of(path: Path, split: str | None) -> list[Path]:
    """The files of a data set, in order; split: of those in the folder, several as in train+validation.

    Raises ConfigError where there is no such split, or several and none is given; DataError where there is no file.
    """
    if path.is_file():
        if split is not None:
            raise ConfigError(f"split {split} would not be read: {path} is one file; give its folder")
        return [path]
    if (path / _SAVED_SPLITS).is_file():
        splits = {str(name): [path / str(name)] for name in _listed_in(path / _SAVED_SPLITS, "splits")}
        return [file for folder in _chosen(path, splits, split) for file in _saved(folder)]
    if (path / _SAVED).is_file():
        files = _saved(path)
        return _chosen(path, {json.loads((path / _SAVED).read_bytes()).get("_split") or "": files}, split)
    return _chosen(path, _by_split(path), split)


def _saved(folder: Path) -> list[Path]:
    """The files of `datasets`' own, in its order."""
    return [folder / str(entry["filename"]) for entry in _listed_in(folder / _SAVED, "_data_files") if isinstance(entry, dict) and "filename" in entry]


def _listed_in(path: Path, key: str) -> list[object]:
    try:
        found = json.loads(path.read_bytes())[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not what `datasets` saves ({type(error).__name__}: {error}); is it whole?") from None
    return found if isinstance(found, list) else []


def _by_split(folder: Path) -> dict[str, list[Path]]:
    """Split -> its files. Raises DataError where folders beside each other hold a split of one name: those are several data sets."""
    files = [file for pattern in ("*", "*/*", "*/*/*") for file in sorted(folder.glob(pattern)) if file.suffix.lower() in ENDINGS and file.is_file()]
    hidden = [file for file in files if any(part.startswith(".") for part in file.relative_to(folder).parts)]
    is_parquet = any(file.suffix.lower() == ".parquet" for file in files)
    splits: dict[str, dict[Path, list[Path]]] = {}
    for file in files:
        if file not in hidden and (file.suffix.lower() == ".parquet") == is_parquet:
            name, parent = _split_of(file, folder)
            splits.setdefault(name, {}).setdefault(parent, []).append(file)
    for name, parents in splits.items():
        if len(parents) > 1:
            one, other, *_ = parents
            raise DataError(f"{folder} holds several data sets, such as {one} and {other}, each with {name or 'files'}: give the path of one of them")
    return {name: files for name, parents in splits.items() for files in parents.values()}


def _split_of(file: Path, folder: Path) -> tuple[str, Path]:
    """The split that the names of a file and its folder say, and the folder of its data set."""
    if named := _SHARD.fullmatch(file.stem):
        return named[1], file.parent
    if file.parent != folder and (known := _keyword(file.parent.name)):
        return known, file.parent.parent
    return _keyword(file.stem) or "", file.parent


def _keyword(name: str) -> str | None:
    return next((_KEYWORDS[word] for word in re.split(r"[^a-z]+", name.lower()) if word in _KEYWORDS), None)


def _chosen(path: Path, splits: Mapping[str, list[Path]], split: str | None) -> list[Path]:
    if not splits:
        raise DataError(f"{path} holds no parquet or Arrow file")
    names = ", ".join(sorted(splits))
    if split is None:
        if len(splits) > 1:
            raise ConfigError(f"{path} holds the splits {names or 'without names'}: give split")
        return next(iter(splits.values()))
    found = []
    for wanted in split.split("+"):
        name = wanted if wanted in splits else next((name for name in splits if _KEYWORDS.get(name, name) == _KEYWORDS.get(wanted, wanted)), None)
        if name is None:
            raise ConfigError(f"{path} has no split {wanted!r}; it has {names or 'files whose names say no split, so leave split out'}")
        found += splits[name]
    return found


def _recognises(found: Found) -> bool:
    if not found.is_folder:
        return found.suffix in ENDINGS
    return bool({_SAVED, _SAVED_SPLITS} & found.names) or _has_files(found.path, 2)


def _has_files(folder: Path, depth: int) -> bool:
    """Whether one of the first entries of a folder, or of a folder in it, is a parquet or Arrow file; an imagefolder's metadata is none."""
    with os.scandir(folder) as entries:
        first = sorted(islice(entries, _MOST_ENTRIES), key=lambda entry: entry.name)
    names = {entry.name for entry in first}
    if "metadata.parquet" in names or any(Path(name).suffix.lower() in ENDINGS for name in names):
        return "metadata.parquet" not in names
    return depth > 0 and any(_has_files(Path(entry.path), depth - 1) for entry in first if entry.is_dir() and not entry.name.startswith("."))


READER = Reader("parquet", "parquet or Arrow files", _recognises, _open, reads=("split", "columns"))


# ----------------------------------------
# Data sets of the Hugging Face Hub: `datasets` fetches them into Arrow files, which are then read as others are.

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]+)?", re.ASCII)
_FILE_ENDINGS = frozenset((*ENDINGS, ".json", ".jsonl", ".csv", ".tsv", ".tar", ".gz", ".zip"))
_LONGEST = 300  # letters of another library's message


def is_hub_name(path: Path) -> bool:
    """Whether a path that does not exist may be OWNER/NAME, or OWNER/NAME:CONFIG, on the Hub."""
    is_local = path.exists() or path.parent.exists() or path.suffix.lower() in _FILE_ENDINGS
    return not is_local and _HUB_NAME.fullmatch(str(path)) is not None


def _open_hub(given: Given) -> ReadSource:
    splits = hub_files(str(given.path), given.cache)
    # The images of a folder on the Hub are named by their whole paths in the cache.
    return open_arrow(given.path, _chosen(given.path, splits, given.split), replace(given, images=given.images or Path("/")))


def hub_files(name: str, cache: Path | None) -> dict[str, list[Path]]:
    """Split -> the Arrow files that `datasets` makes of a data set; name: with :CONFIG where it has several.

    Raises ConfigError where `datasets` is not installed; DataError where the data set cannot be fetched.
    """
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(f"{name} is no file here, and data sets of the Hub need the package datasets ({error}): pip install 'adalink[datasets]'") from None
    place, _, config = name.partition(":")
    try:
        loaded = datasets.load_dataset(place, config or None, cache_dir=None if cache is None else str(cache))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:_LONGEST].rstrip(". ")
        raise DataError(f"{name} is no file or folder here, and as a data set of the Hub it cannot be read: {reason}; check the path or the name") from None
    return {split: [Path(file["filename"]) for file in one.cache_files] for split, one in loaded.items()}


HUB = Reader("hub", "a data set of the Hugging Face Hub", lambda found: False, _open_hub, reads=("split", "columns"))
