"""Shards that are fetched before they are read: what the order of a stream says of the next windows, for all processes of a machine at once."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from adalink.errors import ConfigError
from multimodal.data.shards.cache import READERS, Held, Reader, ShardCache, hold, live_readers
from multimodal.data.shards.storage import redacted

__all__ = ["Ahead", "Plan", "Windows", "check_room"]

_LOG = logging.getLogger("adalink")
_POLL = 0.02  # seconds between two looks at what the machine's processes read, where a look takes less than a twentieth of that
_LONGEST = 0.05  # seconds between two looks for a shard that a sample waits for
_GLANCE = 0.002  # seconds until the second look for a shard that a sample waits for; later ones come more and more slowly
_AGAIN = 1.0  # seconds until a cache without room, or connections, is looked at again though this run reads the same windows
_TURN = 0.25  # seconds between two attempts to be the one that fetches


class Windows(Protocol):
    """An order that reads windows of shards, counted without end over all epochs."""

    n_windows: int  # of an epoch
    window_shards: int  # most shards of one, for each part
    parts: int  # of a step, which machines read

    def shards_of(self, window: int, parts: Sequence[int] | None = None) -> NDArray[np.int64]:
        """int64 [shards]: the numbers of a window's shards, or of those that some parts read."""
        ...

    def state(self) -> dict[str, object]:
        """What the order is a function of, as JSON."""
        ...


class Plan(Protocol):
    """How one set of a stream is read (`multimodal.data.order.Reading`)."""

    @property
    def order(self) -> Windows:
        """The set's own."""
        ...

    @property
    def parts(self) -> range:
        """Those that this process reads."""
        ...

    def windows(self, position: int) -> range:
        """The windows from which a step at this position of the stream may read; what comes before them is needed no more."""
        ...


class Ahead:
    """What one process needs now, and its part in fetching what all of them need next.

    All processes of a machine that read one set in one order are a group. Each says in a file which windows it reads; one of them, whoever has
    the group's lock, fetches the shards of those windows and of the next ones in the order of reading, and removes those that are needed last.
    When it ends, however it ends, another takes its place; parts of shards are gone on with. The rest of the group waits for files to appear.
    """

    def __init__(self, cache: ShardCache, sizes: NDArray[np.int64], plan: Plan, close: Callable[[Path], object]) -> None:
        """sizes: int64 [shards], in bytes. close: called with files that this process needs no more. Raises ConfigError as `check_room`."""
        self.cache, self.plan = cache, plan
        self._sizes, self._close, self._urls = sizes, close, list(cache.shards)
        ends = [cache.path(self._urls[number]).name for number in (0, -1)]
        self._group = hashlib.sha256(repr((plan.order.state(), len(sizes), ends)).encode()).hexdigest()[:16]
        self._lock = threading.Lock()
        self._process, self._windows, self._now = -1, range(0), dict[str, Path]()
        check_room([self])

    def __reduce__(self) -> tuple[type[Ahead], tuple[ShardCache, NDArray[np.int64], Plan, Callable[[Path], object]]]:
        return Ahead, (self.cache, self._sizes, self.plan, self._close)  # a worker process starts its own

    @property
    def needed_bytes(self) -> int:
        """Of a window of the largest shards; parts that follow each other share a shard, and others take one more each."""
        order, parts = self.plan.order, self.plan.parts
        most = order.window_shards * len(parts) + (order.parts > len(parts)) * (1 if parts.step == 1 else len(parts))
        return int(np.sort(self._sizes)[::-1][:most].sum())

    def at(self, position: int) -> None:
        """The sample at this position of the stream is read next."""
        windows = self.plan.windows(position)
        if windows != self._windows or self._process != os.getpid():
            with self._lock:
                try:
                    self._move(windows)
                except OSError as error:  # not even a name can be written; files that are there are read
                    self._windows, self._now = windows, {}
                    stated = f"{error.strerror}; samples that are not in it are read from the server; is the disk full?"
                    _LOG.warning("adalink: the cache %s cannot be written: %s", self.cache.folder, stated)

    def find(self, url: str) -> Path | None:
        """The shard's file, as soon as it is there; None where it must be read from the server."""
        path = self._now.get(url)
        if path is None:  # a sample that the stream does not read now
            path = self.cache.path(url)
            return path if path.exists() else None
        wait = _GLANCE
        while not path.exists():
            if self.cache.failure(url).exists() or not self._thread.is_alive():
                return None
            time.sleep(wait)
            wait = min(2 * wait, _LONGEST)
        return path

    def _move(self, windows: range) -> None:
        if self._process != os.getpid():
            self._start()
        shards = np.concatenate([self.plan.order.shards_of(window, self.plan.parts) for window in windows]).tolist()
        now = {url: self.cache.path(url) for url in (self._urls[shard] for shard in shards)}
        for url in self._now.keys() - now.keys():
            self._close(self._now[url])  # while it is open a removed file takes room on the disk
        self._now, self._windows = now, windows
        names = frozenset(path.name for path in now.values())
        parts = self.plan.parts
        self.cache.reads(self._file, Reader(self._group, (windows.start, windows.stop - 1), tuple(parts), names))
        self._fetcher.wake.set()

    def _start(self) -> None:
        self._now = {}
        path = self.cache.folder / READERS / f"{os.getpid()}-{uuid.uuid4().hex[:8]}.json"
        held = hold(path)
        assert held is not None
        self._file, self._fetcher = held, _Fetcher(self.cache, self._urls, self.plan.order, self._group)
        self._thread = threading.Thread(target=self._fetcher.run, daemon=True, name="shards ahead")
        self._thread.start()
        self._process = os.getpid()
        weakref.finalize(self, _end, held, path, self._fetcher).atexit = False  # the end of the process says the same


def _end(held: Held, path: Path, fetcher: _Fetcher) -> None:
    fetcher.stop.set()
    fetcher.wake.set()
    if held.number >= 0:  # this process's own
        path.unlink(missing_ok=True)
    held.close()


def check_room(sets: Sequence[Ahead]) -> None:
    """Raises ConfigError where the cache of these sets of one stream holds less than one window of each."""
    for one in sets:
        needed = sum(each.needed_bytes for each in sets if each.cache.folder == one.cache.folder)
        most = one.cache.settings.cache_bytes
        if needed > most:
            raise ConfigError(
                f"the cache {one.cache.folder} may hold {most} bytes, and one window of {one.plan.order.window_shards} shards needs {needed}: give "
                f"cache_gib {needed / 2**30:.3g} or more (twice that, so that the next window is fetched meanwhile), or a smaller train.window"
            )


class _Fetcher:
    """The thread that fetches for a group while it has the group's lock."""

    def __init__(self, cache: ShardCache, urls: Sequence[str], order: Windows, group: str) -> None:
        self._cache, self._urls, self._order, self._group = cache, urls, order, group
        self._fetching = set[str]()
        self._tried = set[int]()  # windows whose earlier failures do not count any more
        self._stuck_since: float | None = None
        self._full: tuple[float, object] = (0.0, None)  # when the cache last had no room, and what was read then
        self._used, self._next = -1, np.empty(0, dtype=np.int64)
        self._began = time.time()
        self.stop, self.wake = threading.Event(), threading.Event()

    def run(self) -> None:
        """Until `stop`."""
        try:
            while not self.stop.is_set():
                lock = hold(self._cache.folder / READERS / f"{self._group}.lock", wait=False)
                while lock is not None and not self.stop.is_set():
                    began = time.monotonic()
                    self._look()
                    self.wake.wait(max(_POLL, 20 * (time.monotonic() - began)))
                    self.wake.clear()
                if lock is not None:
                    lock.close()
                self.stop.wait(_TURN)
        except Exception as error:  # whoever waits sees that this thread has ended, and reads from the server
            _LOG.warning("adalink: shards are no longer fetched ahead into %s: %s %s", self._cache.folder, type(error).__name__, error)

    def _look(self) -> None:
        """Begin to fetch what is missing, in the order of reading."""
        try:
            readers = [reader for reader in live_readers(self._cache.folder) if reader.group == self._group]
        except ValueError:  # one is being written
            return
        if not readers:
            return
        seen = sorted((reader.windows, reader.parts) for reader in readers), len(self._fetching)
        if self._full[1] == seen and time.monotonic() - self._full[0] < _AGAIN:
            return
        self._full = time.monotonic(), None
        low, high = min(reader.windows[0] for reader in readers), max(reader.windows[1] for reader in readers)
        parts = sorted(set().union(*(reader.parts for reader in readers)))
        soon = set[str]()
        for window in range(low, high + self._cache.settings.ahead + 1):
            urls = [self._urls[shard] for shard in self._order.shards_of(window, parts).tolist()]
            if window not in self._tried:
                self._tried = {each for each in self._tried if each >= low} | {window}
                for url in urls:
                    self._cache.failure(url).unlink(missing_ok=True)
            soon |= {self._cache.path(url).name for url in urls}
            for url in urls:
                if not self._begin(url, window, soon, is_needed=window <= high):
                    self._full = time.monotonic(), seen
                    return

    def _begin(self, url: str, window: int, soon: set[str], *, is_needed: bool) -> bool:
        """Whether what comes after this shard may be begun as well. soon: names of files that are read up to this window."""
        cache = self._cache
        if url in self._fetching or cache.path(url).exists() or cache.failure(url).exists():
            return True
        if len(self._fetching) >= cache.settings.connections:
            return False
        begun = cache.begin(url, lambda name, used: self._rank(name, used, window, soon))
        if isinstance(begun, Held):
            self._stuck_since = None
            self._fetching.add(url)
            threading.Thread(target=self._fetch, args=(url, begun), daemon=True, name="shard").start()
        elif begun == "failed":
            self._give_up(url, "the disk does not take it")
        elif begun == "full" and is_needed and not self._fetching:
            self._stuck_since = self._stuck_since or time.monotonic()
            if time.monotonic() - self._stuck_since > cache.settings.timeout:
                needed = sum(cache.shards[cache.names[name]].size for name in soon)
                stated = f"{needed} bytes are needed for what is read now, and the cache may hold {cache.settings.cache_bytes}; give more cache_gib"
                self._give_up(url, stated)
                _LOG.warning("adalink: %s has no room in the cache %s: %s; its samples are read from the server", redacted(url), cache.folder, stated)
                return True
        return begun != "full"

    def _fetch(self, url: str, part: Held) -> None:
        try:
            if self._cache.finish(url, part) == "failed":
                self._give_up(url, "it could not be fetched")
        finally:
            self._fetching.discard(url)
            self.wake.set()

    def _give_up(self, url: str, stated: str) -> None:
        try:
            self._cache.failure(url).write_text(stated)
        except OSError:  # a disk on which nothing can be written: whoever waits must not wait for ever
            self.stop.set()

    def _rank(self, name: str, used: float, window: int, soon: set[str]) -> tuple[float, float] | None:
        """First shards of other sets that nobody has read since this run began, then own ones that are read last, then other sets'."""
        url = self._cache.names.get(name)
        if url is None:
            return (0.0 if used < self._began else 2.0, used)
        if name in soon:
            return None
        return (1.0, -float(self._next_use(window)[self._numbers[url]]))

    def _next_use(self, window: int) -> NDArray[np.int64]:
        """int64 [shards]: the window after this one that reads each next, of two epochs."""
        if window != self._used:
            self._next = np.full(len(self._urls), window + 2 * self._order.n_windows, dtype=np.int64)
            for later in range(window + 2 * self._order.n_windows - 1, window, -1):
                self._next[self._order.shards_of(later)] = later
            self._used = window
        return self._next

    @property
    def _numbers(self) -> Mapping[str, int]:
        if not hasattr(self, "_known"):
            self._known = {url: number for number, url in enumerate(self._urls)}
        return self._known
