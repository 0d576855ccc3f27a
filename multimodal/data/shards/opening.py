"""Sets of shards that are opened: folders, tar files and URLs become one table of shards, whose indexes a process opens as it reads."""

from __future__ import annotations

import fcntl
import glob
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from adalink.errors import ConfigError, DataError
from adalink.files import write_whole
from multimodal.data.shards.index import ShardLimits, index_shard
from multimodal.data.shards.manifest import MANIFEST, Known, Manifest, find_shards, parse_manifest, read_manifest, refuse_unfinished
from multimodal.data.shards.members import (
    Compared,
    LocalFolder,
    Members,
    Place,
    Shard,
    ShardTable,
    StoredMembers,
    decode_index,
    find_twice,
    index_name,
    mapped,
    text_sizes,
)
from multimodal.data.shards.storage import RemoteFiles, RemoteSettings, beside, is_url, redacted, remote_files
from multimodal.sample import BadSample

__all__ = ["OpenIndexes", "RemoteFolder", "ShardSet", "StoredLengths", "open_shards", "shard_places"]


# ----------------------------------------
# What a config names: folders and tar files, on disks or on servers, with patterns.


_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def shard_places(names: Sequence[Path | str]) -> list[Place]:
    """Folders and tar files that some names stand for: `set-{00..15}` is sixteen of them, and `*`, `?` and `[...]` match names on disks.

    A str that is a URL stays one. What a pattern matches and is neither a folder nor a tar file is passed over.
    Raises ConfigError where a pattern matches nothing, or names on a server would have to be listed.
    """
    places: list[Place] = []
    for name in names:
        if isinstance(name, Path) and name.exists():
            places.append(name)
            continue
        for each in _counted(str(name)):
            if is_url(each):
                if "*" in each:
                    raise ConfigError(f"{redacted(each)} would need a list of what is on the server: give a range, such as shard-{{000..123}}.tar")
                places.append(each)
            elif glob.has_magic(each) and not Path(each).exists():
                found = [Path(one) for one in sorted(glob.glob(each)) if one.endswith(".tar") or Path(one).is_dir()]
                if not found:
                    raise ConfigError(f"no folder and no tar file matches the shards {each!r}; check the path and the pattern")
                places += found
            else:
                places.append(Path(each))
    return places


def _counted(name: str) -> list[str]:
    """`a-{08..10}` -> `a-08`, `a-09`, `a-10`."""
    found = _RANGE.search(name)
    if found is None or (not is_url(name) and Path(name).exists()):
        return [name]
    first, last = found.groups()
    if int(last) < int(first):
        raise ConfigError(f"the range {found[0]} of the shards {redacted(name) if is_url(name) else name} ends before it begins; give the lower number first")
    numbers = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    return [more for number in numbers for more in _counted(name[: found.start()] + number + name[found.end() :])]


# ----------------------------------------
# Folders on servers.


_SHARE = 32  # of the cache's bound one part is for indexes: they have about a thousandth of the bytes of their shards


@dataclass(frozen=True)
class RemoteFolder:
    """A folder by URL. An index is one request, and one for all processes of a machine where there is a cache."""

    url: str
    files: RemoteFiles
    settings: RemoteSettings

    def place(self, file: str) -> str:
        """The URL of the tar file."""
        return beside(self.url, quote(file))

    def index(self, shard: Shard, compared: Compared | None = None) -> Members:
        """Reads the file and compares it with the manifest. Raises DataError."""
        url = beside(self.url, quote(index_name(shard.file)))
        assert isinstance(shard.members, StoredMembers)
        if self.settings.cache is None:
            return decode_index(self.files.whole(url), redacted(url), shard)
        path = self.settings.cache / "indexes" / f"{shard.members.digest}.idx"
        if (found := _cached(path, shard, compared)) is not None:
            return found
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(path):
            if (found := _cached(path, shard, compared)) is not None:
                return found
            data = self.files.whole(url)
            members = decode_index(data, redacted(url), shard)
            with suppress(DataError):  # on a full disk it is asked for again
                write_whole(path, data)
            if shard.members.digest < "08":  # one of 32 looks at the others: a list of a hundred thousand names takes a while
                _make_room(path.parent, self.settings.cache_bytes // _SHARE)
        return members


def _cached(path: Path, shard: Shard, compared: Compared | None) -> Members | None:
    with suppress(DataError):
        data, seal = mapped(str(path))
        return decode_index(data, str(path), shard, seal, compared)
    return None


def _make_room(folder: Path, most: int) -> None:
    """Removes the indexes that were written first, until three quarters of so many bytes are left. Who has one mapped goes on with it."""
    with suppress(OSError):
        files = sorted((entry.stat().st_mtime_ns, entry.stat().st_size, entry.path) for entry in os.scandir(folder) if entry.name.endswith(".idx"))
        total = sum(size for _, size, _ in files)
        for _, size, path in files if total > most else ():
            if total <= most * 3 // 4:
                break
            os.unlink(path)
            total -= size


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """One process of a machine fetches a file, and the others wait: a lock on one byte of a file, which the name of what is fetched chooses."""
    lock = None
    try:
        with suppress(OSError):  # no such folder, or a file system without locks
            lock = os.open(path.with_name(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            fcntl.lockf(lock, fcntl.LOCK_EX, 1, int(path.name[:7], 16))
        yield
    finally:
        if lock is not None:
            os.close(lock)


# ----------------------------------------
# A set: from manifests where there are any, else from the tar headers.


_ASKED = 256  # shards of a set on a server whose sizes are asked for at its opening: all of a small set, some of a large one
_ASKED_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardSet:
    """Shards that were found whole, as far as opening them looks.

    table     with `problems` left out
    known     of a whole set that has a manifest of the present form, else None
    problems  what this opening left out; what was left out when the set was written counted then
    ignored   members that no sample uses, counted by suffix
    files     reads the shards where they are on servers
    """

    table: ShardTable
    known: Known | None
    problems: tuple[BadSample, ...]
    ignored: Mapping[str, int]
    files: RemoteFiles | None = None

    @property
    def fingerprint(self) -> str:
        """As that of a manifest."""
        return Manifest(shards=self.table, known=self.known).fingerprint


def open_shards(places: Sequence[Place], limits: ShardLimits, remote: RemoteSettings) -> ShardSet:
    """Folders of shards and single tar files, one after the other; a str is a URL, whose folder has a manifest.

    A shard that is missing or of another size than its manifest says raises an error now. Of more than 256 shards on servers 256 are asked for,
    and the others are compared with their check sums as they are read. Keys of a whole set are unique by its manifest; those of several sets,
    and of sets without a manifest of the present form, are compared, for which all indexes are read.

    Raises DataError where a shard is missing, cut or damaged, where two have one key, and where there is none; ConfigError where some places are
    on disks and others on servers.
    """
    if not places:
        raise DataError("the list of shards is empty; give at least one tar file")
    kinds = {_kind(place) for place in places}
    if len(kinds) > 1:
        raise ConfigError(f"the shards of one set are read from {' and '.join(sorted(kinds))}: give several sets, with mix, or shards of one kind")
    gathered = _Gathered(remote_files(places[0], remote) if isinstance(places[0], str) else None, limits, remote)
    for place in places:
        gathered.add(place)
    return gathered.whole()


class _Gathered:
    """Shards of manifests, and tar files that are indexed, in the order in which they are named."""

    def __init__(self, files: RemoteFiles | None, limits: ShardLimits, remote: RemoteSettings) -> None:
        self._files, self._limits, self._remote = files, limits, remote
        self._tables: list[tuple[ShardTable, int]] = []  # with the numbers of their first shards, when they are joined
        self._known: list[Known | None] = []
        self._folders: dict[Place, range | None] = {}  # the numbers of a folder's shards; None where it has no manifest
        self._numbers: dict[Place, int] = {}  # of shards that may be named one by one
        self._listed = set[Place]()  # folders whose shards are in it
        self._chosen: list[int] = []
        self._problems: list[BadSample] = []
        self._ignored = Counter[str]()

    def add(self, place: Place) -> None:
        """A folder or a tar file."""
        if not _is_folder(place):
            self._add_file(place, _folder_of(place))
        elif (numbers := self._folder(place)) is not None:
            self._chosen += numbers
        else:
            for path in tqdm(find_shards(Path(place)), unit="shard", desc="indexing shards", disable=None, leave=False):
                self._add_file(path, place)

    def _add_file(self, place: Place, folder: Place) -> None:
        if folder not in self._listed and (numbers := self._folder(folder)) is not None:
            table = next(table for table, first in self._tables if first == numbers.start)
            self._numbers |= {each: number for number, each in zip(numbers, table.places, strict=True)}
        self._listed.add(folder)
        if place not in self._numbers:
            if isinstance(place, str):
                raise DataError(f"{redacted(place)} is not in the manifest of its folder; check the name, or write or index the shards again")
            found = index_shard(place, self._limits)
            self._problems += found.skipped
            self._ignored.update(found.ignored)
            self._numbers[place] = self._append(ShardTable.of([found.shard], LocalFolder(place.parent)), None)[0]
        self._chosen.append(self._numbers[place])

    def _folder(self, folder: Place) -> range | None:
        """The numbers of the shards that a folder's manifest names; None where it has none."""
        if folder not in self._folders:
            manifest = self._manifest(folder)
            self._folders[folder] = None if manifest is None else self._append(manifest.table, manifest.known)
        return self._folders[folder]

    def _manifest(self, folder: Place) -> Manifest | None:
        if isinstance(folder, str):
            assert self._files is not None
            name = beside(folder, MANIFEST)
            return parse_manifest(self._files.whole(name), redacted(name), RemoteFolder(folder, self._files, self._remote))
        refuse_unfinished(folder)
        return read_manifest(folder) if (folder / MANIFEST).exists() else None

    def _append(self, table: ShardTable, known: Known | None) -> range:
        last, start = self._tables[-1] if self._tables else ((), 0)
        self._tables.append((table, start + len(last)))
        self._known.append(known)
        return range(start + len(last), start + len(last) + len(table))

    def whole(self) -> ShardSet:
        """All of them. Raises DataError."""
        joined = ShardTable.joined([table for table, _ in self._tables])
        is_all = self._chosen == list(range(len(joined)))
        known = self._known[0] if len(self._known) == 1 else None
        named = joined if is_all else joined.chosen(self._chosen)
        _check_sizes(named, self._files)
        table, over = _within(named, self._limits)
        is_unique = known is not None and len(set(self._chosen)) == len(self._chosen)
        twice = None if is_unique else find_twice(table)
        if twice is not None:
            key, one, other = twice
            places = f"{_name(table.places[one])} and {_name(table.places[other])}"
            raise DataError(f"the shards {places} both have the key {key!r}; keys must be unique in a data set")
        return ShardSet(
            table=table, known=known if is_all and not over else None, problems=(*self._problems, *over), ignored=self._ignored, files=self._files
        )  # fmt: skip


def _kind(place: Place) -> str:
    if isinstance(place, Path):
        return "disks"
    scheme = urlsplit(place).scheme.lower()
    return "web servers" if scheme in ("http", "https") else f"{scheme} stores"


def _is_folder(place: Place) -> bool:
    return not urlsplit(place).path.endswith(".tar") if isinstance(place, str) else place.suffix != ".tar" or place.is_dir()


def _folder_of(place: Place) -> Place:
    if isinstance(place, Path):
        return place.parent
    parts = urlsplit(place)
    return urlunsplit(parts._replace(path=parts.path.rpartition("/")[0]))


def _check_sizes(table: ShardTable, files: RemoteFiles | None) -> None:
    """Raises DataError where a shard is missing or of another size."""
    sizes: list[int] = table.rows["size"].tolist()
    bar = partial(tqdm, unit="shard", desc="opening shards", disable=None, leave=False)
    if files is not None:
        numbers = range(0, len(table), -(-len(table) // _ASKED) or 1)
        urls = [str(table.places[number]) for number in numbers]
        with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
            for number, url, size in zip(numbers, urls, bar(pool.map(files.size, urls), total=len(urls)), strict=True):
                _check_size(redacted(url), size, sizes[number])
        return
    prefixes = [os.fsencode(str(folder.place(""))) + b"/" for folder in table.folders]
    for folder, file, expected in bar(zip(table.rows["folder"].tolist(), table.rows["file"].tolist(), sizes, strict=True), total=len(table)):
        path = prefixes[folder] + file  # a Path for each of 100,000 shards would take half a second
        try:
            size = os.stat(path).st_size
        except OSError as error:
            name = os.fsdecode(path)
            raise DataError(f"the shard {name}, which {MANIFEST} names, cannot be opened: {error.strerror}; write or fetch it again") from error
        if size != expected:
            _check_size(os.fsdecode(path), size, expected)


def _check_size(name: str, size: int, expected: int) -> None:
    if size != expected:
        raise DataError(f"the shard {name} has {size} bytes, and {MANIFEST} says {expected}; write or fetch it again")


def _within(table: ShardTable, limits: ShardLimits) -> tuple[ShardTable, list[BadSample]]:
    """The samples whose members obey the limits, and the others. Indexes of shards that have none of the others are not read."""
    retained: dict[int, Members] = {}
    skipped = []
    for number in np.flatnonzero((table.rows["largest"] > (limits.max_image_bytes, limits.max_text_bytes)).any(axis=1)).tolist():
        members, name = table[number].members, _name(table.places[number])
        image, text = members.table[:, 0, 1], members.table[:, 1:, 1].max(axis=1, initial=0)
        over = (image > limits.max_image_bytes) | (text > limits.max_text_bytes)
        for index in np.flatnonzero(over).tolist():
            reason = "too many bytes" if image[index] > limits.max_image_bytes else "too much text"
            detail = f"{members.key(index)!r} of {name} has members of {image[index]} and {text[index]} bytes"
            skipped.append(BadSample(key=members.key(index), reason=reason, detail=detail))
        retained[number] = members.only(~over)
    return table.with_members(retained) if retained else table, skipped


def _name(place: Place) -> str:
    return redacted(place) if isinstance(place, str) else str(place)


# ----------------------------------------
# Indexes that are open in this process.


_MAPPED, _MOST_MAPPED = 2**26, 2**8  # bytes and number of the indexes that are open in one process; each takes an open file


class OpenIndexes:
    """Shard number -> its members and its place. Indexes are read when they are first asked for; the first that were read leave first.

    No lock where a shard is found, as in `LocalShards`; an index that leaves the table stays open for as long as somebody reads from it.
    """

    def __init__(self, table: ShardTable) -> None:
        self.table = table
        self._open: dict[int, tuple[Members, Place]] = {}
        self._sizes: dict[int, int] = {}  # bytes of those that are not in memory anyway
        self._compared: Compared = set()
        self._bytes, self._lock = 0, Lock()

    def __reduce__(self) -> tuple[type[OpenIndexes], tuple[ShardTable]]:
        return OpenIndexes, (self.table,)  # a worker process maps its own

    def __getitem__(self, number: int) -> tuple[Members, Place]:
        return self._open.get(number) or self._opened(number)

    def _opened(self, number: int) -> tuple[Members, Place]:
        """Raises DataError where the index cannot be read."""
        members = self.table[number].members
        loaded = members.load(compared=self._compared) if isinstance(members, StoredMembers) else members
        with self._lock:
            if loaded is not members and number not in self._sizes:
                self._sizes[number] = int(loaded.table.nbytes + loaded.ends.nbytes) + len(loaded.packed_keys)
                self._bytes += self._sizes[number]
            found = self._open[number] = loaded, self.table.places[number]
            while len(self._sizes) > 1 and (self._bytes > _MAPPED or len(self._sizes) > _MOST_MAPPED):
                first = next(iter(self._sizes))
                self._bytes -= self._sizes.pop(first)
                del self._open[first]
        return found


class StoredLengths:
    """int64 [samples]: `text_sizes`, from the index of each shard when samples of it are asked for.

    sha256   of all of them, as the manifest has it
    """

    def __init__(self, touched: OpenIndexes, sizes: NDArray[np.int64], sha256: str) -> None:
        self.sha256, self._touched, self._ends = sha256, touched, np.cumsum(sizes)
        self._starts = self._ends - sizes

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Those at some indices, in their order; each index is read once."""
        shards = np.searchsorted(self._ends, indices, side="right")
        lengths = np.empty(len(indices), dtype=np.int64)
        order = np.argsort(shards, kind="stable")
        for some in np.split(order, np.flatnonzero(np.diff(shards[order])) + 1) if len(order) else ():
            number = int(shards[some[0]])
            lengths[some] = text_sizes(self._touched[number][0].table[indices[some] - self._starts[number]])
        return lengths

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.concatenate([text_sizes(shard.members.table) for shard in self._touched.table]).astype(dtype or np.int64, copy=False)
