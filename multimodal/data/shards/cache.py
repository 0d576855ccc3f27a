"""Whole shards on the local disk, fetched in the background while their first samples are read from the server.

A run reads all its shards evenly, so putting one out to take another in gains nothing: shards of this set stay until the folder is full, and
the rest is read from the server. Shards of other sets make room, the least recently used first.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from adalink.errors import DataError
from multimodal.data.shards.manifest import Shard
from multimodal.data.shards.storage import RemoteFiles, shown, unsigned

__all__ = ["ShardCache", "cached_name"]

_CHUNK = 2**23  # bytes of one read from the server
_LOG = logging.getLogger("adalink")
_NOT_KEPT = "adalink: %s is not kept in the cache %s: %s"


def cached_name(url: str, shard: Shard) -> str:
    """The name of a shard in the cache: a sha256 of its URL, and the beginning of its own, so that a new version is another file.

    A signature in the URL does not count, since each new one would be another file; where the shard's own sha256 is not known it does, since
    what looks like a signature may say which file is meant.
    """
    place = unsigned(url) if shard.sha256 else url
    return f"{hashlib.sha256(place.encode()).hexdigest()}-{shard.sha256[:16] or shard.size}.tar"


class ShardCache:
    """A folder that several processes share; each file in it is whole, and was compared with its sha256 in the manifest."""

    def __init__(self, folder: Path, max_bytes: int, files: RemoteFiles, shards: dict[str, Shard]) -> None:
        """shards: by URL, all of the set. Raises DataError where the folder cannot be made."""
        self._folder, self._max_bytes, self._files, self._shards = folder, max_bytes, files, shards
        self._names = {url: cached_name(url, shard) for url, shard in shards.items()}
        self._wanted: queue.SimpleQueue[str] | None = None
        self._process, self._asked, self._lock = os.getpid(), set[str](), threading.Lock()
        self._discarded = set[str]()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"the cache {folder} cannot be made ({error.strerror}); give another folder as the data set's cache, or none") from error

    def __reduce__(self) -> tuple[type[ShardCache], tuple[Path, int, RemoteFiles, dict[str, Shard]]]:
        return ShardCache, (self._folder, self._max_bytes, self._files, self._shards)

    def find(self, url: str) -> Path | None:
        """The shard's file; None, and the shard is fetched in the background, where it is not there yet."""
        path = self.path(url)
        if path.exists():
            return path
        self._ask(url)
        return None

    def path(self, url: str) -> Path:
        """Where the shard's file is, or would be."""
        return self._folder / self._names[url]

    def discard(self, url: str) -> bool:
        """Remove a file whose samples are damaged; whether there was one. The first time it is fetched again when it is next asked for."""
        with self._lock:
            if url not in self._discarded:
                self._discarded.add(url)
                self._asked.discard(url)
        try:
            self.path(url).unlink()
        except OSError:
            return False
        return True

    def fetch(self, url: str) -> None:
        """Fetch a shard now, if there is room and no other process has; what stands in the way is logged in one sentence."""
        shard, name = self._shards[url], self._names[url]
        with self._alone():
            if (self._folder / name).exists() or not self._make_room(shard.size):
                return
            part = self._folder / f".{name}.part"
            try:
                _fetch(self._files, url, shard, part)
                part.replace(self._folder / name)
            except OSError as error:
                _LOG.warning(_NOT_KEPT, shown(url), self._folder, f"{error.strerror}; its samples are read from the server; is the disk full?")
            except DataError as error:
                _LOG.warning(_NOT_KEPT, shown(url), self._folder, error)
            finally:
                with suppress(OSError):
                    part.unlink()

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
        while True:
            self.fetch(wanted.get())

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One fetch at a time on a machine: the bound then holds, and what lies half written is nobody's."""
        lock = os.open(self._folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for left in self._folder.glob(".*.part"):
                left.unlink(missing_ok=True)
            yield
        finally:
            os.close(lock)

    def _make_room(self, size: int) -> bool:
        """Whether the folder holds the bound with `size` more bytes; other sets' shards are removed for that."""
        own = set(self._names.values())
        held = {path: path.stat() for path in self._folder.glob("*.tar")}
        total = size + sum(status.st_size for status in held.values())
        others = sorted((path for path in held if path.name not in own), key=lambda path: max(held[path].st_atime, held[path].st_mtime))
        if total - sum(held[path].st_size for path in others) > self._max_bytes:
            return False
        while total > self._max_bytes:
            path = others.pop(0)
            path.unlink(missing_ok=True)
            total -= held[path].st_size
        return True


def _fetch(files: RemoteFiles, url: str, shard: Shard, part: Path) -> None:
    """Writes the shard, and compares it with the manifest's sha256 where that is known."""
    digest = hashlib.sha256()
    with part.open("wb") as file:
        for at in range(0, shard.size, _CHUNK):
            data = files.read(url, at, min(_CHUNK, shard.size - at))
            digest.update(data)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    if shard.sha256 and digest.hexdigest() != shard.sha256:
        raise DataError("it is not what its manifest says, by its sha256; its samples are checked one by one, and the damaged ones are skipped")
