"""Whole shards of servers in a folder that all processes of a machine share: fetched once, compared with their manifest, within a bound."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from adalink.errors import DataError
from multimodal.data.shards.members import Shard
from multimodal.data.shards.storage import Passing, RemoteFiles, RemoteSettings, once_in_a_while, patiently, redacted, unsigned

__all__ = ["READERS", "Held", "Rank", "Reader", "ShardCache", "cached_name", "hold", "is_held", "live_readers"]

_LOG = logging.getLogger("adalink")
_NOT_CACHED = "adalink: %s is not stored in the cache %s: %s"
READERS = "readers"  # the folder in the cache
_POLL = 0.05  # seconds between two looks at what another process does
_SLOW = 2**20  # bytes per second: what is slower is named in the log


def cached_name(url: str, shard: Shard) -> str:
    """The name of a shard in the cache: a sha256 of its URL, and the beginning of its own, so that a new version is another file.

    A signature in the URL does not count, since each new one would be another file; where the shard's own sha256 is not known it does, since
    what looks like a signature may say which file is meant.
    """
    place = unsigned(url) if shard.sha256 else url
    return f"{hashlib.sha256(place.encode()).hexdigest()}-{shard.sha256[:16] or shard.size}.tar"


# ----------------------------------------
# Locks that end with their process, however it ends, and are not passed on to forked children.


_HELD: weakref.WeakSet[Held] = weakref.WeakSet()


class Held:
    """A file that is open, and locked against every other process and thread until `close`."""

    def __init__(self, number: int) -> None:
        self.number = number
        _HELD.add(self)

    def close(self) -> None:
        """Once or more."""
        number, self.number = self.number, -1
        if number >= 0:
            os.close(number)


def hold(path: Path, *, wait: bool = True, create: bool = True) -> Held | None:
    """None where another has it and this one does not wait. Raises OSError, FileNotFoundError where it is not there and is not to be created."""
    while True:
        held = Held(os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_CREAT * create, 0o644))
        try:
            fcntl.flock(held.number, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.stat(path).st_ino == os.fstat(held.number).st_ino:
                return held
        except BlockingIOError:
            held.close()
            return None
        except FileNotFoundError:
            pass
        held.close()  # it was removed or renamed since it was opened


def is_held(path: Path) -> bool:
    """Whether another process or thread has it locked."""
    try:
        held = hold(path, wait=False, create=False)
    except FileNotFoundError:
        return False
    if held is not None:
        held.close()
    return held is None


def _after_fork() -> None:
    for held in list(_HELD):
        held.close()


os.register_at_fork(after_in_child=_after_fork)


# ----------------------------------------
# Who reads what: each process that reads windows of shards has a small file in the cache's folder `readers`, which it locks while it lives.


@dataclass(frozen=True)
class Reader:
    """What a process needs now.

    group     equal for all processes that read one set in one order
    windows   of the order, the first and the last
    parts     of each step that it reads
    names     of files
    """

    group: str
    windows: tuple[int, int]
    parts: tuple[int, ...]
    names: frozenset[str]


def live_readers(folder: Path) -> list[Reader]:
    """Those of processes that live, of all runs that share the cache; files of dead ones are removed. Raises ValueError while one is written."""
    found = []
    for path in sorted((folder / READERS).glob("*.json")):
        with suppress(FileNotFoundError):
            text = path.read_bytes()
            if is_held(path) and text:  # without text it has only begun
                group, windows, parts, names = json.loads(text)
                found.append(Reader(group, (windows[0], windows[1]), tuple(parts), frozenset(names)))
            elif not is_held(path):
                path.unlink()
    return found


# ----------------------------------------
# The folder.
#
#     HASH-SHA.tar              a whole shard
#     .HASH-SHA.tar.SIZE.part   the beginning of one of SIZE bytes; whoever fetches it has it locked; later it is the rest that is fetched
#     .HASH-SHA.tar.failed      why one cannot be stored; whoever waits for it reads from the server
#     .lock                     held while something is added or removed
#
# In the order that shuffles all samples a run reads all its shards evenly, so putting one out to take another in gains nothing: shards of this
# set stay until the folder is full, and the rest is read from the server; other sets' shards make room, the least recently used first.
# Where windows of shards are read, `multimodal.data.shards.ahead` says which shards are needed last.


Rank = Callable[[str, float], tuple[float, float] | None]
"""Name and time of last use of a file -> what is removed first has the lowest; None: it stays."""

Outcome = Literal["whole", "elsewhere", "full", "failed"]
"""It is in the folder; another process fetches it, or all connections are used; there is no room; it cannot be stored."""


class ShardCache:
    """A folder that several processes share; each file in it is whole, and was compared with its sha256 in the manifest."""

    def __init__(self, settings: RemoteSettings, files: RemoteFiles, shards: Mapping[str, Shard]) -> None:
        """shards: by URL, all of the set in its order. Raises DataError where the folder cannot be made."""
        assert settings.cache is not None
        self.folder, self.settings, self.shards = settings.cache, settings, shards
        self._files = files
        self._wanted: queue.SimpleQueue[str] | None = None
        self._process, self._asked, self._lock = os.getpid(), set[str](), threading.Lock()
        self._discarded, self._paths = set[str](), dict[str, Path]()
        try:
            (self.folder / READERS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"the cache {self.folder} cannot be made ({error.strerror}); give another folder as the data set's cache, or none") from error

    def __reduce__(self) -> tuple[type[ShardCache], tuple[RemoteSettings, RemoteFiles, Mapping[str, Shard]]]:
        return ShardCache, (self.settings, self._files, self.shards)

    def find(self, url: str) -> Path | None:
        """The shard's file; None, and the shard is fetched in the background, where it is not there yet."""
        path = self.path(url)
        if path.exists():
            return path
        self._ask(url)
        return None

    def path(self, url: str) -> Path:
        """Where the shard's file is, or would be."""
        path = self._paths.get(url)
        if path is None:
            path = self._paths[url] = self.folder / cached_name(url, self.shards[url])
        return path

    def failure(self, url: str) -> Path:
        """The file that says why the shard is not stored."""
        return self.folder / f".{self.path(url).name}.failed"

    @cached_property
    def names(self) -> Mapping[str, str]:
        """The URLs of the set's shards by their names in the folder."""
        return {self.path(url).name: url for url in self.shards}

    def discard(self, url: str) -> bool:
        """Remove a file whose samples are damaged; whether there was one. The first time it is fetched again when it is next asked for."""
        with self._lock:
            if url not in self._discarded:
                self._discarded.add(url)
                self._asked.discard(url)
            else:
                self.failure(url).write_text("its copy was damaged twice")
        try:
            self.path(url).unlink()
        except OSError:
            return False
        return True

    def fetch(self, url: str) -> Outcome:
        """Fetch a shard now, if there is room and no other process does; what stands in the way is logged in one sentence.

        Shards of other sets that no process needs now make room.
        """
        begun = self.begin(url, self._others)
        return begun if isinstance(begun, str) else self.finish(url, begun)

    def begin(self, url: str, rank: Rank) -> Held | Outcome:
        """The shard's part, locked, with room for all of it; else why not. rank: which files may make room."""
        try:
            with self._alone():
                return self._begin(self.path(url), self._part(url), self.shards[url].size, rank)
        except OSError as error:
            self._no_disk(url, error)
            return "failed"

    def finish(self, url: str, part: Held) -> Outcome:
        """Fetch what the part lacks."""
        path = self._part(url)
        try:
            _fetch(self._files, url, self.shards[url], part.number, self.settings)
            with self._alone():
                path.replace(self.path(url))
            return "whole"
        except OSError as error:
            self._no_disk(url, error)
            path.unlink(missing_ok=True)  # others may need the room
        except DataError as error:
            _LOG.warning(_NOT_CACHED, redacted(url), self.folder, error)
            if os.fstat(part.number).st_size == 0:
                path.unlink(missing_ok=True)
        finally:
            part.close()
        return "failed"

    def _part(self, url: str) -> Path:
        return self.folder / f".{self.path(url).name}.{self.shards[url].size}.part"

    def _no_disk(self, url: str, error: OSError) -> None:
        _LOG.warning(_NOT_CACHED, redacted(url), self.folder, f"{error.strerror}; its samples are read from the server; is the disk full?")

    def _begin(self, path: Path, part: Path, size: int, rank: Rank) -> Held | Outcome:
        if path.exists():
            return "whole"
        fetched = [other for other in self.folder.glob(".*.part") if is_held(other)]
        if part in fetched or len(fetched) >= self.settings.connections:
            return "elsewhere"
        if not self._make_room(size + sum(int(other.name.split(".")[-2]) for other in fetched), rank, {part, *fetched}):
            return "full"
        return hold(part, wait=False) or "elsewhere"

    def _make_room(self, size: int, rank: Rank, counted: Collection[Path]) -> bool:
        """Whether the folder holds the bound with `size` bytes more, after files of low rank were removed. counted: parts that `size` includes."""
        held = {path: path.stat() for path in self.folder.glob("*.tar")}
        parts = {path: path.stat() for path in self.folder.glob(".*.part") if path not in counted}  # of processes that ended
        total = size + sum(status.st_size for status in (held | parts).values())
        if total <= self.settings.cache_bytes:
            return True
        needed = frozenset[str]().union(*(reader.names for reader in live_readers(self.folder)))
        ranks = {path: rank(path.name, max(status.st_atime, status.st_mtime)) for path, status in held.items() if path.name not in needed}
        removed = [*parts, *sorted((path for path in ranks if ranks[path] is not None), key=lambda path: ranks[path] or ())]
        held |= parts
        if total - sum(held[path].st_size for path in removed) > self.settings.cache_bytes:
            return False
        while total > self.settings.cache_bytes:
            path = removed.pop(0)
            path.unlink(missing_ok=True)
            total -= held[path].st_size
        return True

    def _others(self, name: str, used: float) -> tuple[float, float] | None:
        return None if name in self.names else (0.0, used)

    def reads(self, file: Held, reader: Reader) -> None:
        """Write what a process needs now into its own file in `readers`."""
        with self._alone():
            os.ftruncate(file.number, 0)
            os.pwrite(file.number, json.dumps([reader.group, reader.windows, reader.parts, sorted(reader.names)]).encode(), 0)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No other process adds or removes a shard meanwhile, nor says that it reads other ones."""
        lock = hold(self.folder / ".lock")
        try:
            yield
        finally:
            if lock is not None:
                lock.close()

    def _ask(self, url: str) -> None:
        """Once for each shard and process; a thread of a parent process does not live in its forked children."""
        with self._lock:
            if self._process != os.getpid() or self._wanted is None:
                self._process, self._asked, self._wanted = os.getpid(), set(), queue.SimpleQueue()
                threading.Thread(target=self._fetch_all, args=(self._wanted,), daemon=True, name="shard cache").start()
            if url not in self._asked:
                self._asked.add(url)
                self._wanted.put(url)

    def _fetch_all(self, wanted: queue.SimpleQueue[str]) -> None:
        """Shards that another process fetches, and those for which no connection is left, are asked about again later."""
        waiting: list[str] = []
        while True:
            waiting.append(wanted.get())
            while waiting:
                while not wanted.empty():
                    waiting.append(wanted.get())
                waiting = [url for url in waiting if self.fetch(url) == "elsewhere"]
                time.sleep(_POLL * bool(waiting))


# ----------------------------------------
# One shard, from where its part ends.


def _fetch(files: RemoteFiles, url: str, shard: Shard, file: int, settings: RemoteSettings) -> None:
    """Writes the rest of the shard, and compares all of it with the manifest's sha256 where that is known: only then a part is gone on with.

    Raises DataError, and OSError where it cannot be written.
    """
    begun = os.fstat(file).st_size
    if not shard.sha256 or begun > shard.size:
        begun = 0
    for start in dict.fromkeys((begun, 0)):  # a part of another shard, or damaged, is fetched anew
        os.ftruncate(file, start)
        if _written(files, url, shard, file, start, settings) == shard.sha256 or not shard.sha256:
            os.fsync(file)
            return
    os.ftruncate(file, 0)
    raise DataError("it is not what its manifest says, by its sha256; its samples are checked one by one, and the damaged ones are skipped")


def _written(files: RemoteFiles, url: str, shard: Shard, file: int, at: int, settings: RemoteSettings) -> str:
    """The sha256 of the whole shard, whose bytes from `at` on were fetched and written. Attempts count from the last byte that came."""
    digest = hashlib.sha256()
    for start in range(0, at, 2**22):
        digest.update(os.pread(file, min(2**22, at - start), start))
    started, first = time.monotonic(), at

    def some() -> None:
        nonlocal at
        before = at
        try:
            with closing(files.pieces(url, at, shard.size)) as pieces:
                for data in pieces:
                    digest.update(data)
                    at += _write(file, data, at)
                    seconds = time.monotonic() - started
                    if (at - first) / _SLOW < seconds and seconds > settings.timeout:
                        once_in_a_while(url, f"reading waits for {redacted(url)}: {at - first} bytes came in {seconds:.0f} s")
        except Passing as error:
            if at == before:
                raise
            once_in_a_while(url, f"the connection to {redacted(url)} ended: {error}; the rest is fetched")
            time.sleep(settings.first_wait)

    while at < shard.size:
        patiently(some, url, settings)
    return digest.hexdigest()


def _write(file: int, data: bytes, at: int) -> int:
    """All of the data; its number of bytes."""
    done = 0
    while done < len(data):
        done += os.pwrite(file, memoryview(data)[done:], at + done)
    return done
