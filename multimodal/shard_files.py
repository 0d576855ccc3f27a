"""Bytes of shards, by place: files that stay open, and shards on servers with their cache."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from threading import Lock

from adalink.errors import DataError
from multimodal.fsspec_files import FsspecFiles
from multimodal.http_files import HttpFiles
from multimodal.manifest import Shard
from multimodal.remote import RemoteFiles, RemoteSettings
from multimodal.shard_cache import ShardCache

__all__ = ["LocalShards", "RemoteShards", "remote_files"]

_OPEN_FILES = 256  # per process; a set may have more shards than a process may have open files


def remote_files(url: str, settings: RemoteSettings) -> RemoteFiles:
    """Who reads this URL."""
    return HttpFiles(settings) if url.lower().startswith(("http://", "https://")) else FsspecFiles(settings)


class RemoteShards:
    """Shards by URL: from the cache where they are in it, else by ranges."""

    at_once = 2**62  # bytes up to which a sample's members are read together: a request costs more than any copy

    def __init__(self, files: RemoteFiles, settings: RemoteSettings, shards: Mapping[str, Shard]) -> None:
        self._files, self._local = files, LocalShards()
        self._cache = ShardCache(settings.cache, settings.cache_bytes, files, dict(shards)) if settings.cache is not None else None

    def read(self, place: str, offset: int, size: int) -> bytes:
        """Exactly `size` bytes; raises DataError."""
        path = self._cache.find(place) if self._cache is not None else None
        if path is not None:
            with suppress(DataError):  # another process has put the file out
                return self._local.read(path, offset, size)
        return self._files.read(place, offset, size)

    def forget(self, place: str) -> bool:
        """Whether reading again may give other bytes, because a copy in the cache was damaged.

        The file that was read may have been discarded by another process, and the one of its name now may be a good one: it stays.
        """
        if self._cache is None:
            return False
        path = self._cache.path(place)
        was_read, now = self._local.close(path), _identity(path)
        return self._cache.discard(place) if was_read in (None, now) else True


class LocalShards:
    """Files open for reading at an offset, the first opened closed first; safe between threads and after a fork.

    Order of opening and not of use: a run reads all shards evenly, and a lock around every read would cost a tenth of it.
    """

    at_once = 2**15  # bytes up to which cutting one block in parts costs less than reading each

    def __init__(self) -> None:
        self._open: dict[Path, _OpenFile] = {}
        self._lock = Lock()

    def __reduce__(self) -> tuple[type[LocalShards], tuple[()]]:
        return LocalShards, ()  # a worker process opens its own

    def read(self, path: Path, offset: int, size: int) -> bytes:
        """Exactly `size` bytes; raises DataError where the file ends before."""
        try:
            file = self._open.get(path) or self._opened(path)
            data = os.pread(file.number, size, offset)
            while 0 < len(data) < size and (more := os.pread(file.number, size - len(data), offset + len(data))):
                data += more
        except OSError as error:
            raise DataError(f"the shard {path} cannot be read: {error.strerror}; is it still there?") from error
        if len(data) < size:
            end = os.fstat(file.number).st_size
            raise DataError(f"the shard {path} was cut at byte {end} since it was opened; write or fetch it again")
        return data

    def forget(self, path: Path) -> bool:
        """Whether reading again may give other bytes."""
        return False

    def close(self, path: Path) -> tuple[int, int] | None:
        """Read this file anew the next time; which file was open under its name, None where none was."""
        with self._lock:
            file = self._open.pop(path, None)
        return None if file is None else _identity(file.number)

    def _opened(self, path: Path) -> _OpenFile:
        with self._lock:
            file = self._open[path] = _OpenFile(path)
            while len(self._open) > _OPEN_FILES:
                del self._open[next(iter(self._open))]
        return file


def _identity(file: Path | int) -> tuple[int, int] | None:
    """Which file on the disk it is: two of one name are two."""
    try:
        status = os.stat(file)
    except OSError:
        return None
    return status.st_dev, status.st_ino


class _OpenFile:
    """Closed when nobody reads from it any more, so that another thread may still be reading when it leaves the table."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        with suppress(AttributeError, OSError):  # AttributeError: it was never opened
            os.close(self.number)
