"""The samples of shards: in memory, or in a small file beside each shard that is mapped when the shard is first read.

The file `NAME.idx` of the shard `NAME.tar`, little-endian: 80 bytes (16 of format, number of samples, bytes of all keys, size and sha256 of the
shard, crc32 of what follows), then int64[n, 3, 3] places, int64[n] ends of the keys, and the keys in UTF-8 one after the other. It lies beside
the shard and not in one file for the set, so that shards are written side by side, go on after a kill, and move to other disks and stores with
what is needed to read them; a process reads those of the shards that it reads.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from adalink.errors import DataError
from adalink.files import write_whole

__all__ = [
    "Buffer", "Compared", "LocalFolder", "Members", "Part", "Place", "Shard", "ShardFolder", "ShardTable", "StoredMembers", "check_places", "decode_index",
    "encode_index", "find_twice", "index_name", "store_index", "text_sizes",
]  # fmt: skip


Part = Literal["image", "json", "txt"]
PARTS: tuple[Part, ...] = ("image", "json", "txt")

ABSENT = (-1, -1, -1)
"""Offset, size and crc32 of a member that a sample does not have."""
UNKNOWN_CRC = -1

Place = Path | str
"""Where a shard is: a file, or the URL of one."""
Buffer = bytes | memoryview


Compared = set[int]
"""Seals of index files that were compared with their manifest: where a file is open anew and has not changed, that is not done again."""


class Members:
    """The samples of one shard, in order: a key each, and the place of each part.

    packed_keys   the keys in UTF-8, one after the other
    ends          int64[n]: where each ends
    table         int64[n, 3 parts, 3]: offset of the part's data in the shard in bytes, its size in bytes, its crc32 or -1 where it is not known
    """

    packed_keys: Buffer
    ends: NDArray[np.int64]
    table: NDArray[np.int64]

    def __init__(self, keys: Iterable[str], table: NDArray[np.int64]) -> None:
        encoded = [key.encode("utf-8", "backslashreplace") for key in keys]
        self.packed_keys = b"".join(encoded)
        self.ends = np.cumsum([len(key) for key in encoded], dtype=np.int64)
        self.table = table.reshape(len(encoded), len(PARTS), 3)

    @classmethod
    def of(cls, packed_keys: Buffer, ends: NDArray[np.int64], table: NDArray[np.int64]) -> Members:
        """From what it holds."""
        members = cls.__new__(cls)
        members.packed_keys, members.ends, members.table = packed_keys, ends, table
        return members

    def only(self, retained: NDArray[np.bool_]) -> Members:
        """The samples at which `retained` is true."""
        return Members([self.key(index) for index in np.flatnonzero(retained).tolist()], self.table[retained])

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def largest(self) -> tuple[int, int]:
        """Bytes of the largest image, and of the largest json or txt; 0 where there is none."""
        return int(self.table[:, 0, 1].max(initial=0)), int(self.table[:, 1:, 1].max(initial=0))

    def key(self, index: int) -> str:
        """The key under which the shard's file holds sample `index`."""
        start = self.ends.item(index - 1) if index else 0
        return str(self.packed_keys[start : self.ends.item(index)], "utf-8")

    def encoded_keys(self) -> Iterator[bytes]:
        """All of them, in order, in UTF-8."""
        packed = bytes(self.packed_keys)
        return (packed[start:end] for start, end in pairwise([0, *self.ends.tolist()]))

    def all_keys(self) -> Iterator[str]:
        """All of them, in order."""
        return (key.decode() for key in self.encoded_keys())


class StoredMembers(Members):
    """Those of an index file, which is read when more than their number is asked for.

    load     reads the file; raises DataError. It may be given `Compared`
    digest   the sha256 of the file
    """

    def __init__(self, samples: int, largest: tuple[int, int], digest: str, load: Callable[..., Members]) -> None:
        self.samples, self.digest, self.load, self._largest = samples, digest, load, largest

    def __len__(self) -> int:
        return self.samples

    @property
    def largest(self) -> tuple[int, int]:
        """As that of what is in the file, without reading it."""
        return self._largest

    def __getattr__(self, name: str) -> Any:
        if name not in ("packed_keys", "ends", "table"):
            raise AttributeError(name)
        self.__dict__.update(vars(self.load()))
        return self.__dict__[name]

    def __reduce__(self) -> tuple[type[StoredMembers], tuple[int, tuple[int, int], str, Callable[..., Members]]]:
        return StoredMembers, (self.samples, self._largest, self.digest, self.load)


def text_sizes(table: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64 [n]: bytes of each sample's txt member, or of its json where it has none. table: as that of `Members`."""
    sizes: NDArray[np.int64] = table[..., 1]
    return np.where(sizes[:, 2] >= 0, sizes[:, 2], sizes[:, 1])


def check_places(table: NDArray[np.int64], size: int, file: str) -> None:
    """Raises ValueError where a place lies beyond the shard's `size` bytes, or a sample lacks an image or a text."""
    offset, length = table[..., 0], table[..., 1]
    if not np.where(offset < 0, length < 0, (offset >= 512) & (length >= 0) & (offset <= size - np.maximum(length, 0))).all():
        raise ValueError(f"an offset of {file!r} lies outside its {size} bytes")
    present = offset >= 0
    if not present[:, 0].all():
        raise ValueError(f"a sample of {file!r} has no image")
    if not present[:, 1:].any(axis=1).all():
        raise ValueError(f"a sample of {file!r} has no text")


@dataclass(frozen=True, kw_only=True, eq=False)
class Shard:
    """One tar file of a set."""

    file: str  # a name in the manifest's folder, never a path
    size: int  # bytes
    sha256: str  # empty where the file was indexed without reading it
    members: Members


# ----------------------------------------
# The index file of one shard.


_FORMAT = b"adalink index 1\n"
_HEAD = struct.Struct("<16sQQQ32sQ")
_MEND = "fetch it again, or run `adalink shards check --upgrade true`"


def index_name(file: str) -> str:
    """`shard-000000.tar` -> `shard-000000.idx`."""
    return file.removesuffix(".tar") + ".idx"


def encode_index(shard: Shard) -> bytes:
    """The content of a shard's index file: a function of its size, its sha256 and its members."""
    members = shard.members
    content = b"".join((members.table.astype("<i8").tobytes(), members.ends.astype("<i8").tobytes(), members.packed_keys))
    digest = bytes.fromhex(shard.sha256) if len(shard.sha256) == 64 else bytes(32)
    return _HEAD.pack(_FORMAT, len(members), len(members.packed_keys), shard.size, digest, zlib.crc32(content)) + content


def store_index(shard: Shard, folder: Path) -> Shard:
    """Writes the shard's index into a folder, whole or not at all; the shard with its members there. Raises DataError."""
    data = encode_index(shard)
    write_whole(folder / index_name(shard.file), data)
    stored = LocalFolder(folder).members(shard.file, shard.size, shard.sha256, len(shard.members), hashlib.sha256(data).hexdigest(), shard.members.largest)
    return Shard(file=shard.file, size=shard.size, sha256=shard.sha256, members=stored)


def decode_index(data: Buffer, name: str, shard: Shard, seal: int = 0, compared: Compared | None = None) -> Members:
    """The members in an index file that is the one that the manifest names; they share the memory of `data`.

    name    of the file, for messages
    shard   what the manifest says, with StoredMembers
    seal    as `mapped` gives it, which is added to `compared`

    Raises DataError where the file is cut, damaged, of a newer version, of another shard, or not the one that the manifest names.
    """
    stored = shard.members
    assert isinstance(stored, StoredMembers)
    head, seal = _checked_head(data, name), hash((seal, stored.digest, shard.size))
    is_known = compared is not None and seal in compared
    if not is_known and hashlib.sha256(data).hexdigest() != stored.digest:
        if zlib.crc32(memoryview(data)[_HEAD.size :]) != head[5]:
            raise DataError(f"the index {name} is damaged, by its check sum; {_MEND}")
        raise DataError(f"the index {name} is not the one that manifest.json names: it, or its shard, was replaced since; fetch or write the set again")
    n, key_bytes = head[1], head[2]
    if (n, head[3]) != (stored.samples, shard.size) or (len(shard.sha256) == 64 and head[4].hex() != shard.sha256):
        raise DataError(
            f"the index {name} disagrees with its shard: it is of {n} samples in {head[3]} bytes, and manifest.json says {stored.samples} in {shard.size}, "
            "or another sha256; index the shards again"
        )
    table = np.frombuffer(data, "<i8", n * 9, _HEAD.size).reshape(n, len(PARTS), 3)
    members = Members.of(memoryview(data)[len(data) - key_bytes :], np.frombuffer(data, "<i8", n, _HEAD.size + 72 * n), table)
    if is_known:
        return members
    try:
        check_places(members.table, shard.size, shard.file)
        _check_keys(members)
    except ValueError as error:
        raise DataError(f"the index {name} is damaged: {error}; {_MEND}") from error
    if compared is not None:
        compared.add(seal)
    return members


def _checked_head(data: Buffer, name: str) -> tuple[Any, ...]:
    if len(data) < _HEAD.size:
        raise DataError(f"the index {name} is cut: it has {len(data)} bytes, and its head alone {_HEAD.size}; {_MEND}")
    head = _HEAD.unpack_from(data)
    if head[0] != _FORMAT:
        if head[0][:14] == _FORMAT[:14] and head[0][14:15].isdigit():
            raise DataError(f"the index {name} is of a newer version, {head[0][8:15].decode()!r}, and this one reads 'index 1'; update adalink")
        raise DataError(f"the index {name} is damaged: it begins with {head[0]!r}, expected {_FORMAT!r}; {_MEND}")
    expected = _HEAD.size + 80 * head[1] + head[2]
    if len(data) != expected:
        raise DataError(f"the index {name} is cut or damaged: it has {len(data)} bytes, and its head says {expected}; {_MEND}")
    return head


def _check_keys(members: Members) -> None:
    """Raises ValueError where the ends do not cut the keys into pieces of UTF-8."""
    ends, packed = members.ends, np.frombuffer(members.packed_keys, np.uint8)
    if (np.diff(ends, prepend=0) < 0).any() or ends[-1:].sum() != len(packed):
        raise ValueError("its keys have no place")
    str(members.packed_keys, "utf-8")
    if (packed[ends[ends < len(packed)]] & 0xC0 == 0x80).any():
        raise ValueError("a key ends within a letter")


class ShardFolder(Protocol):
    """Where shards and their indexes lie."""

    def place(self, file: str) -> Place:
        """Of a shard."""
        ...

    def index(self, shard: Shard, compared: Compared | None = None) -> Members:
        """What the index of a shard with StoredMembers holds. Raises DataError."""
        ...


@dataclass(frozen=True)
class LocalFolder:
    """A folder on this machine. Indexes are mapped: processes that read one share its memory."""

    path: Path

    def place(self, file: str) -> Path:
        """The tar file."""
        return self.path / file

    def index(self, shard: Shard, compared: Compared | None = None) -> Members:
        """Maps the file and compares it with the manifest. Raises DataError."""
        path = f"{self.path}/{index_name(shard.file)}"
        data, seal = mapped(path)
        return decode_index(data, path, shard, seal, compared)

    def members(self, *row: Any) -> StoredMembers:
        """Of a row of a `ShardTable`, without its folder."""
        return _stored(self, *row)


def mapped(path: str) -> tuple[Buffer, int]:
    """The bytes of a file, without reading them, and a number that changes with the file. Raises DataError where it cannot be opened."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            status = os.fstat(file)
            data = memoryview(mmap.mmap(file, 0, access=mmap.ACCESS_READ)) if status.st_size else b""  # no bytes cannot be mapped
        finally:
            os.close(file)
        return data, hash((status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size))
    except OSError as error:
        raise DataError(f"the index {path} cannot be opened: {error.strerror}; {_MEND}") from error


def _stored(folder: ShardFolder, file: str, size: int, sha256: str, samples: int, digest: str, largest: tuple[int, int]) -> StoredMembers:
    return StoredMembers(samples, largest, digest, partial(_load, folder, file, size, sha256, samples, digest, largest))


def _load(folder: ShardFolder, file: str, size: int, sha256: str, *row: Any, compared: Compared | None = None) -> Members:
    return folder.index(Shard(file=file, size=size, sha256=sha256, members=_stored(folder, file, size, sha256, *row)), compared)


# ----------------------------------------
# All shards of a set, as columns: a hundred thousand take some megabytes, are cheap to send to worker processes and shared by them after a fork.


def _row_type(width: int) -> np.dtype[Any]:
    columns = [("file", f"S{width}"), ("size", "<i8"), ("sha256", "S64"), ("samples", "<i8"), ("index", "S64"), ("largest", "<i8", 2), ("folder", "<i4")]
    return np.dtype(columns)


Row = tuple[str, int, str, int, str, tuple[int, int]]
"""File, size, sha256, samples, sha256 of its index (empty where it has none), `Members.largest`."""


class ShardTable(Sequence[Shard]):
    """The shards of a set, made when they are asked for.

    rows      one for each shard
    folders   where they lie
    members   shard -> its members, where they are in memory, or not all of those in its index
    """

    def __init__(self, rows: NDArray[Any], folders: Sequence[ShardFolder], members: Mapping[int, Members]) -> None:
        self.rows, self.folders, self.members = rows, tuple(folders), dict(members)

    @classmethod
    def of_rows(cls, rows: Sequence[Row], folder: ShardFolder) -> ShardTable:
        """Shards in one folder, with their indexes."""
        names = [row[0].encode("utf-8", "surrogateescape") for row in rows]
        kind = _row_type(max(map(len, names), default=1))
        return cls(np.array([(name, *row[1:], 0) for name, row in zip(names, rows, strict=True)], dtype=kind), [folder], {})

    @classmethod
    def of(cls, shards: Iterable[Shard], folder: ShardFolder) -> ShardTable:
        """Shards in one folder; members in memory stay there."""
        found = tuple(shards)
        table = cls.of_rows([row_of(shard) for shard in found], folder)
        table.members = {number: shard.members for number, shard in enumerate(found)}
        return table

    @classmethod
    def joined(cls, tables: Sequence[ShardTable]) -> ShardTable:
        """One after the other."""
        if len(tables) == 1:
            return tables[0]
        starts = np.cumsum([0, *map(len, tables)]).tolist()
        folders: list[ShardFolder] = []
        parts = []
        for table in tables:
            parts.append(table.rows.copy())
            parts[-1]["folder"] += len(folders)
            folders += table.folders
        members = {start + number: each for start, table in zip(starts, tables, strict=False) for number, each in table.members.items()}
        return cls(np.concatenate(parts), folders, members)

    def chosen(self, numbers: Sequence[int]) -> ShardTable:
        """Some of them, in another order."""
        members = {number: self.members[old] for number, old in enumerate(numbers) if old in self.members}
        return ShardTable(self.rows[list(numbers)], self.folders, members)

    def with_members(self, members: Mapping[int, Members]) -> ShardTable:
        """The same, where other members stand for what some indexes hold."""
        table = ShardTable(self.rows.copy(), self.folders, {**self.members, **members})
        for number, each in members.items():
            table.rows["samples"][number] = len(each)
        return table

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Shard:  # type: ignore[override]
        number = range(len(self))[number]
        name, size, sha256, samples, digest, largest, folder = self.rows[number].item()
        file = name.decode("utf-8", "surrogateescape")
        members = self.members.get(number)
        if members is None:
            members = _stored(self.folders[folder], file, size, sha256.decode(), samples, digest.decode(), tuple(largest.tolist()))
        elif isinstance(members, StoredMembers):
            members = StoredMembers(members.samples, members.largest, members.digest, members.load)  # what it reads is the caller's
        return Shard(file=file, size=size, sha256=sha256.decode(), members=members)

    @property
    def places(self) -> Sequence[Place]:
        """Where each shard is."""
        return _Places(self)

    @property
    def by_place(self) -> Mapping[str, Shard]:
        """The shards by the names of their places, made when they are asked for."""
        return _ByPlace(self)


class _ByPlace(Mapping[str, Shard]):
    def __init__(self, table: ShardTable) -> None:
        self._table = table

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {str(place): number for number, place in enumerate(self._table.places)}

    def __reduce__(self) -> tuple[type[_ByPlace], tuple[ShardTable]]:
        return _ByPlace, (self._table,)

    def __getitem__(self, place: str) -> Shard:
        return self._table[self._numbers[place]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._table)


class _Places(Sequence[Place]):
    def __init__(self, table: ShardTable) -> None:
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, number: Any) -> Any:
        """A place, or a list of them for a slice."""
        if isinstance(number, slice):
            return [self[each] for each in range(len(self))[number]]
        row = self._table.rows[range(len(self))[number]]
        folder: ShardFolder = self._table.folders[row["folder"]]
        return folder.place(row["file"].decode("utf-8", "surrogateescape"))


def row_of(shard: Shard) -> Row:
    """The shard as a `ShardTable` holds it."""
    digest = shard.members.digest if isinstance(shard.members, StoredMembers) else ""
    return shard.file, shard.size, shard.sha256, len(shard.members), digest, shard.members.largest


# ----------------------------------------
# Keys are unique in a set.


_AT_ONCE = 2**24  # keys whose hashes are in memory together: 128 MiB


def find_twice(shards: Sequence[Shard]) -> tuple[str, int, int] | None:
    """A key that stands in two shards, and their numbers; None where each key is in one.

    One shard's members are in memory at a time. Where there are more keys than `_AT_ONCE`, all are read again for each further part of the hashes.
    """
    passes = -(-sum(len(shard.members) for shard in shards) // _AT_ONCE) or 1
    for part in range(passes):
        whole = np.sort(np.concatenate([np.empty(0, np.int64), *_hashes(shards, part, passes)]))
        candidates = set(whole[1:][whole[1:] == whole[:-1]].tolist())
        found = _first_twice(shards, candidates) if candidates else None
        if found is not None:
            return found
    return None


def _hashes(shards: Sequence[Shard], part: int, parts: int) -> Iterator[NDArray[np.int64]]:
    for shard in shards:
        hashes = np.fromiter(map(hash, shard.members.encoded_keys()), np.int64, len(shard.members))
        yield hashes[hashes % parts == part]


def _first_twice(shards: Sequence[Shard], hashes: set[int]) -> tuple[str, int, int] | None:
    seen: dict[bytes, int] = {}
    for number, shard in enumerate(shards):
        for key in shard.members.encoded_keys():
            if hash(key) in hashes and seen.setdefault(key, number) != number:
                return key.decode(), seen[key], number
    return None
