"""The rows of parquet and Arrow files, read by row groups at their offsets and never a whole file at once."""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

from adalink.errors import AdalinkError, ConfigError, DataError

__all__ = ["ENDINGS", "ArrowRows", "import_arrow", "open_file", "reading_errors"]

ENDINGS = frozenset((".parquet", ".arrow", ".feather"))
HELD = 2**28  # bytes of decoded row groups that a process keeps
PIECE = 2**26  # bytes of rows that are decoded at a time where rows are read in order
_MOST_ROWS = 2**16  # of a piece
_OPEN_FILES = 64  # parquet files that a process keeps open
_SLICES, _SLICE, _TAIL = 32, 2**12, 2**16  # of a file, for its fingerprint: a number, and bytes
_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"
IMAGE = b"-"  # stands for the bytes of an image that are not read


def import_arrow() -> Any:
    """The module pyarrow, with its parts. Raises ConfigError where it is not installed."""
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(f"parquet and Arrow files need pyarrow, which is not installed ({error}): pip install 'adalink[parquet]'") from None
    return pyarrow


@contextmanager
def reading_errors(place: str) -> Iterator[None]:
    """Raises DataError, which names the place, in place of what pyarrow and the disk raise."""
    try:
        yield
    except AdalinkError:
        raise
    except FileNotFoundError:
        raise DataError(f"{place} does not exist; check the path") from None
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors, those of damaged files OSErrors
        reason = str(error).strip().splitlines()[0].partition(". ")[0].rstrip(".") if str(error).strip() else type(error).__name__
        raise DataError(f"{place} cannot be read: {reason}; is the file whole?") from None


# ----------------------------------------
# One file: blocks of rows, of which each can be read alone.


class BlockFile(Protocol):
    """A file of blocks: the row groups of parquet, the record batches of Arrow.

    counts      rows of each block
    is_mapped   reading a block decodes nothing
    """

    schema: Any
    counts: list[int]
    is_mapped: bool

    def size(self, columns: Sequence[str]) -> int:
        """Bytes of these columns, decoded; an estimate."""

    def read(self, block: int, columns: Sequence[str]) -> Any:
        """A pyarrow Table or RecordBatch."""

    def pieces(self, columns: Sequence[str], rows: int, *, light: Collection[str] = ()) -> Iterator[Any]:
        """RecordBatches of at most so many rows, in order. light: columns of images, which are left out or come without their bytes; lists of bytes come."""


def open_file(path: Path) -> BlockFile:
    """A parquet or Arrow file, by its first bytes. Raises DataError where it is neither, or is cut."""
    with reading_errors(str(path)):
        if path.stat().st_size < 12:
            raise DataError(f"{path} holds {path.stat().st_size} bytes, which is no parquet or Arrow file")
        with path.open("rb") as file:
            start = file.read(6)
            file.seek(-len(_STREAM_END), os.SEEK_END)
            end = file.read()
        if start[:4] == b"PAR1":
            return _ParquetFile(path)
        if start != b"ARROW1" and start[:4] != b"\xff\xff\xff\xff":
            raise DataError(f"{path} begins with {start!r}, which is no parquet or Arrow file: is it compressed, or not downloaded whole?")
        if start != b"ARROW1" and end != _STREAM_END:
            raise DataError(f"{path} is a stream of Arrow batches without an end: it was cut short, so write or fetch it again")
        return _ArrowFile(path, is_stream=start != b"ARROW1")


class _ParquetFile:
    is_mapped = False

    def __init__(self, path: Path) -> None:
        self._file = import_arrow().parquet.ParquetFile(path)
        self.schema = self._file.schema_arrow
        self._metadata = self._file.metadata
        self.counts = [self._metadata.row_group(number).num_rows for number in range(self._metadata.num_row_groups)]

    def size(self, columns: Sequence[str]) -> int:
        wanted = [number for number, leaf in enumerate(self._leaves()) if leaf.partition(".")[0] in columns or leaf in columns]
        groups = (self._metadata.row_group(number) for number in range(len(self.counts)))
        return sum(group.column(number).total_uncompressed_size for group in groups for number in wanted)

    def read(self, block: int, columns: Sequence[str]) -> Any:
        return self._file.read_row_group(block, columns=list(columns), use_threads=False)

    def pieces(self, columns: Sequence[str], rows: int, *, light: Collection[str] = ()) -> Iterator[Any]:
        leaves = [name for name in columns if name not in light] + self._light_leaves(light)
        return iter(self._file.iter_batches(batch_size=rows, columns=leaves, use_threads=False))

    def _leaves(self) -> list[str]:
        schema = self._metadata.schema
        return [schema.column(number).path for number in range(len(schema.names))]

    def _light_leaves(self, columns: Collection[str]) -> list[str]:
        """The leaves of these columns that are no bytes; of a list of bytes those too, for their number."""
        schema = self._metadata.schema
        light: dict[str, list[str]] = {}
        heavy: dict[str, str] = {}
        for number, leaf in enumerate(self._leaves()):
            name, about = leaf if leaf in columns else leaf.partition(".")[0], schema.column(number)
            if name in columns and about.physical_type == "BYTE_ARRAY" and about.logical_type.type == "NONE":
                if about.max_repetition_level:
                    heavy[name] = leaf
            elif name in columns:
                light.setdefault(name, []).append(leaf)
        return [leaf for leaves in light.values() for leaf in leaves] + [leaf for name, leaf in heavy.items() if name not in light]


class _ArrowFile:
    """Mapped into memory: a row is read where it lies. Where its batches are compressed, each is decoded as a whole when it is read."""

    def __init__(self, path: Path, *, is_stream: bool) -> None:
        arrow = import_arrow()
        mapped = arrow.memory_map(str(path))
        self._reader = arrow.ipc.open_stream(mapped) if is_stream else arrow.ipc.open_file(mapped)
        self._batches: list[Any] = []
        self.counts: list[int] = []
        self.schema, self.is_mapped, self._bytes = self._reader.schema, True, 0
        before = arrow.total_allocated_bytes()
        for batch in self._reader if is_stream else map(self._reader.get_batch, range(self._reader.num_record_batches)):
            if not self.counts and arrow.total_allocated_bytes() - before > batch.nbytes // 2 > 0:
                self.is_mapped = False
                if is_stream:
                    raise DataError(f"{path} is a stream of Arrow batches that are compressed: write it as parquet, or without compression")
            self.counts.append(batch.num_rows)
            self._bytes += batch.nbytes
            if self.is_mapped:
                self._batches.append(batch)
        if self.is_mapped:
            mapped.close()  # the batches stay mapped, without an open file

    def size(self, columns: Sequence[str]) -> int:
        return self._bytes

    def read(self, block: int, columns: Sequence[str]) -> Any:
        return (self._batches[block] if self.is_mapped else self._reader.get_batch(block)).select(list(columns))

    def pieces(self, columns: Sequence[str], rows: int, *, light: Collection[str] = ()) -> Iterator[Any]:
        wanted = [name for name in columns if name not in light or is_list(self.schema.field(name).type)]
        for block, count in enumerate(self.counts):
            batch = self.read(block, wanted)
            for start in range(0, count, rows):
                yield batch.slice(start, rows)


def has_bytes(kind: Any) -> bool:
    """Whether values of a pyarrow type hold bytes: binary, or a struct or list of it."""
    types = import_arrow().types
    if types.is_struct(kind):
        return any(has_bytes(kind.field(number).type) for number in range(kind.num_fields))
    return has_bytes(kind.value_type) if is_list(kind) else bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind))


def is_image(kind: Any) -> bool:
    """Whether values of a pyarrow type are images: bytes, a struct with them, or a list of either."""
    if import_arrow().types.is_struct(kind):
        return "bytes" in [kind.field(number).name for number in range(kind.num_fields)]
    return is_image(kind.value_type) if is_list(kind) else has_bytes(kind)


def is_list(kind: Any) -> bool:
    """Whether a pyarrow type is one of lists."""
    types = import_arrow().types
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


# ----------------------------------------
# All files as one table with random access.


@dataclass(frozen=True)
class _Source:
    """A file, and where its rows are read: in itself, or in an unpacked copy."""

    file: Path
    read_from: Path


class ArrowRows:
    """The rows of parquet and Arrow files, one file after the other; a `tasks.data.rows.RowFile`.

    Nothing is read at opening but where the blocks of each file lie. A row is read with its block; the last blocks, of up to 256 MiB, stay decoded.
    Arrow files are mapped, and nothing of them is decoded (`tasks.data.arrow.write.unpack` makes such files of parquet).

    path      the data set's, for messages
    files     its files, in the order of the rows
    columns   those that are read
    """

    def __init__(self, path: Path, files: Sequence[Path], *, columns: Sequence[str] | None = None, read_from: Sequence[Path] = ()) -> None:
        """read_from: for each file the one whose rows are read. Raises DataError where one cannot be read, lacks a column, or all have no row."""
        self.path = path
        self._sources = [_Source(file, copy) for file, copy in zip(files, read_from or files, strict=True)]
        self._opened: dict[Path, BlockFile] = {}
        self._blocks: dict[int, tuple[list[tuple[str, Any]], int]] = {}
        self.held_bytes = 0  # of decoded blocks
        self._lock = Lock()
        self._starts: list[int] = []  # the first row of each block
        self._places: list[tuple[int, int]] = []  # file and block of it
        self._ends: list[int] = []  # of each file, the row after its last
        names: tuple[str, ...] | None = tuple(columns) if columns is not None else None
        for number, source in enumerate(self._sources):
            opened = self._file(number)
            names = tuple(opened.schema.names) if names is None else names
            if lacking := [name for name in names if name not in opened.schema.names]:
                raise DataError(f"{source.file} has no column {lacking[0]!r}, and {files[0].name} has; it has {', '.join(map(repr, opened.schema.names))}")
            first = self._ends[-1] if self._ends else 0
            self._starts += [first + start for start in accumulate(opened.counts[:-1], initial=0)][: len(opened.counts)]
            self._places += [(number, block) for block in range(len(opened.counts))]
            self._ends.append(first + sum(opened.counts))
        self.columns = names or ()
        if not len(self):
            raise DataError(f"{path} holds no row")

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_opened": {}, "_blocks": {}, "held_bytes": 0, "_lock": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._lock = Lock()

    @property
    def files(self) -> tuple[Path, ...]:
        """The data set's files."""
        return tuple(source.file for source in self._sources)

    @property
    def copy_folder(self) -> Path | None:
        """Where the files lie whose rows are read, where these are unpacked copies."""
        first = self._sources[0]
        return first.read_from.parent if first.read_from != first.file else None

    @cached_property
    def fingerprint(self) -> str:
        """Of each file's size, end and some slices: parquet's sizes and statistics of all row groups stand at the end. Folders do not count."""
        digest = hashlib.sha256()
        for source in self._sources:
            digest.update(file_fingerprint(source.file).encode())
        return digest.hexdigest()

    @property
    def schema(self) -> Any:
        """The first file's pyarrow schema."""
        return self._file(0).schema

    @cached_property
    def first(self) -> Mapping[str, object]:
        """The first row, read without the rest of its block."""
        return next(iter(self.batches(self.columns, rows=1))).to_pylist()[0]  # type: ignore[no-any-return]

    @cached_property
    def is_mapped(self) -> bool:
        """Whether a row is read without decoding others."""
        return all(self._file(number).is_mapped for number in range(len(self._sources)))

    @cached_property
    def decoded_bytes(self) -> int:
        """What the rows take in memory, about."""
        return sum(self._file(number).size(self.columns) for number in range(len(self._sources)))

    @property
    def largest_block_bytes(self) -> int:
        """What the largest block takes in memory, about."""
        most = max(end - start for start, end in zip(self._starts, [*self._starts[1:], len(self)], strict=True))
        return self.decoded_bytes * most // len(self)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, number: int) -> Mapping[str, object]:
        """Raises DataError, with file and row, where its block is damaged."""
        block = bisect_right(self._starts, number) - 1
        at = number - self._starts[block]
        try:
            return {name: column[at].as_py() for name, column in self._block(block)}
        except UnicodeDecodeError as error:
            raise DataError(f"{self.place(number)} holds a text that is not UTF-8 ({error.reason})") from None
        except DataError as error:
            raise DataError(f"{self.place(number)}: {error}") from None

    def __iter__(self) -> Iterator[Mapping[str, object]]:
        for batch in self.batches(self.columns):
            yield from batch.to_pylist()

    def place(self, number: int) -> str:
        """`train-00000-of-00003.parquet, row 7`; each file's rows are counted from 0."""
        file, row = self.position(number)
        return f"{self._sources[file].file.name}, row {row}"

    def position(self, number: int) -> tuple[int, int]:
        """The number of the file that holds a row, and the row's number in it."""
        file = bisect_right(self._ends, number)
        return file, number - (self._ends[file - 1] if file else 0)

    def batches(self, columns: Sequence[str], *, rows: int | None = None, light: Collection[str] = ()) -> Iterator[Any]:
        """pyarrow RecordBatches of these columns, in order. rows: of a batch; by default those of about 64 MiB. Raises DataError."""
        for number, source in enumerate(self._sources):
            file = self._file(number)
            with reading_errors(str(source.file)):
                mean = 64 if light else file.size(columns) // max(sum(file.counts), 1)
                yield from file.pieces(columns, rows or max(1, min(_MOST_ROWS, PIECE // max(mean, 1))), light=light)

    def without_bytes(self) -> Iterator[dict[str, object]]:
        """Every row, in order, with `IMAGE` for each image that is bytes: those are not read. Raises DataError."""
        heavy = [name for name in self.columns if is_image(self.schema.field(name).type)]
        count = import_arrow().compute.list_value_length
        for batch in self.batches(self.columns, light=heavy):
            images = {name: count(batch.column(name)).to_pylist() for name in heavy if name in batch.schema.names and is_list(batch.schema.field(name).type)}
            rest = batch.select([name for name in batch.schema.names if name not in heavy])
            for at, row in enumerate(rest.to_pylist() if rest.num_columns else [{} for _ in range(batch.num_rows)]):
                yield {**row, **{name: [IMAGE] * (images[name][at] or 0) if name in images else IMAGE for name in heavy}}

    def only(self, columns: Sequence[str], read_from: Sequence[Path] = ()) -> ArrowRows:
        """The same rows with these columns alone; read_from: for each file the one whose rows are read."""
        return ArrowRows(self.path, self.files, columns=columns, read_from=read_from)

    def _block(self, number: int) -> list[tuple[str, Any]]:
        """Name and values of each column of a block."""
        known = self._blocks.get(number)
        if known is None:
            file, block = self._places[number]
            with self._lock, reading_errors(f"block {block} of {self._sources[file].read_from}"):
                opened = self._file(file)
                table = opened.read(block, self.columns)
                columns = [(name, _whole(table.column(at))) for at, name in enumerate(table.schema.names)]
                known = columns, 0 if opened.is_mapped else table.nbytes
                while self._blocks and self.held_bytes + known[1] > HELD:
                    self.held_bytes -= self._blocks.pop(next(iter(self._blocks)))[1]
                self.held_bytes += known[1] - self._blocks.get(number, ([], 0))[1]
                self._blocks[number] = known
        return known[0]

    def _file(self, number: int) -> BlockFile:
        path = self._sources[number].read_from
        opened = self._opened.get(path)
        if opened is None:
            opened = open_file(path)
            while sum(not one.is_mapped for one in self._opened.values()) >= _OPEN_FILES:
                del self._opened[next(name for name, one in self._opened.items() if not one.is_mapped)]
            self._opened[path] = opened
        return opened


def _whole(column: Any) -> Any:
    """A column in one piece where it is."""
    return column.chunk(0) if getattr(column, "num_chunks", 0) == 1 else column


def file_fingerprint(path: Path) -> str:
    """Of a file's size, its last 64 KiB and 32 slices of 4 KiB. Raises DataError."""
    with reading_errors(str(path)), path.open("rb") as file:
        size = path.stat().st_size
        digest = hashlib.sha256(str(size).encode())
        for at in sorted({*range(0, size, max(size // _SLICES, 1)), max(size - _TAIL, 0)}):
            file.seek(at)
            digest.update(file.read(_TAIL if at == max(size - _TAIL, 0) else _SLICE))
    return digest.hexdigest()
