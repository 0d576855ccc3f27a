"""Files on servers: which names are URLs, how they are read over HTTP or by fsspec, and whole shards on the local disk."""

from __future__ import annotations

import base64
import fcntl
import hashlib
import http.client
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import SplitResult, unquote, urljoin, urlsplit, urlunsplit

from adalink.errors import ConfigError, DataError
from multimodal.data.shards.members import Shard

__all__ = [
    "FsspecFiles", "HttpFiles", "Passing", "RemoteFiles", "RemoteSettings", "ShardCache", "beside", "cached_name", "is_url",
    "patiently", "redacted", "unsigned",
]  # fmt: skip


# ----------------------------------------
# Files on servers: which names are URLs, how patiently they are read, and who reads them.


T = TypeVar("T")
_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
# Query parameters that prove who may read a file, and until when: of Amazon's, Google's, Microsoft's, Alibaba's and Tencent's stores, of
# CloudFront, Akamai and Fastly, and of servers of one's own. Each new link has others for the same file.
_PROOF = re.compile(
    "(x-(amz|goog|oss|cos|ms|bz|obs|tos|hw)-.*|q-(sign|ak|key|header|url|signature).*|signature|expires?|exp|expiry|policy|key-pair-id|awsaccesskeyid|"
    "googleaccessid|ossaccesskeyid|accesskeyid|security-token|sig|se|st|sv|sp|sr|ss|srt|spr|sip|si|sks|skt|ske|skv|skoid|sktid|saoid|suoid|scid|"
    "token|access_?token|auth(_?key|_?token)?|authorization|hdnt[sal]|hmac|hash|verify|__token__|__gda__|wstoken)",
    re.IGNORECASE,
)
_LONGEST_WAIT = 30.0  # seconds between two attempts


@dataclass(frozen=True, kw_only=True)
class RemoteSettings:
    """How shards on servers are read."""

    cache: Path | None = None  # a folder for whole shards; none: each sample is read from the server each time
    cache_bytes: int = 50 * 2**30  # most that the folder may hold
    attempts: int = 6  # of one read, with pauses that double
    first_wait: float = 0.5  # seconds before the second attempt: 0.5, 1, 2, 4, 8 are 15.5 in all
    timeout: float = 30.0  # seconds without a byte after which an attempt has failed

    def __post_init__(self) -> None:
        """Check what a caller can get wrong."""
        if self.attempts < 1 or self.cache_bytes < 0 or not self.first_wait >= 0 or not self.timeout > 0:
            raise ConfigError(
                f"{self}: attempts are 1 or more, cache_bytes and first_wait 0 or more, and the timeout is a positive number of seconds"
            )


class RemoteFiles(Protocol):
    """Reads files by URL; safe between threads and after a fork. All raise DataError."""

    def size(self, url: str) -> int:
        """Bytes of a file."""
        ...

    def read(self, url: str, offset: int, size: int) -> bytes:
        """Exactly `size` bytes."""
        ...

    def whole(self, url: str) -> bytes:
        """The whole file, of moderate size."""
        ...


class Passing(Exception):
    """A failure that another attempt may not meet; the text completes `the file URL cannot be read: `."""

    def __init__(self, what: str, wait: float = 0.0) -> None:
        super().__init__(what)
        self.wait = wait  # seconds that the server asked for


def patiently(read: Callable[[], T], url: str, settings: RemoteSettings) -> T:
    """What `read` gives, at the first attempt that does not raise Passing. Raises DataError after the last."""
    started, wait = time.monotonic(), settings.first_wait
    for attempt in range(1, settings.attempts + 1):
        try:
            return read()
        except Passing as error:
            if attempt == settings.attempts:
                spent = time.monotonic() - started
                raise DataError(
                    f"{redacted(url)} cannot be read: {error}, in the last of {attempt} attempts over {spent:.0f} s; "
                    "is the server well? --resume goes on with the next sample"
                ) from error
            time.sleep(min(max(wait, error.wait), _LONGEST_WAIT))
            wait *= 2
    raise AssertionError("there is at least one attempt")


def is_url(name: str) -> bool:
    """Whether a name is read from a server; what begins with `pipe:` is not, and is never run."""
    return _URL.match(name) is not None


def beside(folder: str, name: str) -> str:
    """The URL of a file in the folder of a URL; a query (a signature, say) stays at the end."""
    parts = urlsplit(folder)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))


def unsigned(url: str) -> str:
    """The URL without password and signature: the same for each link to one file. What else is in the query stays, in its order."""
    parts = urlsplit(url)
    query = "&".join(pair for pair in parts.query.split("&") if _PROOF.fullmatch(unquote(pair.partition("=")[0])) is None)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query=query))


def redacted(url: str) -> str:
    """The URL for a message: without password and query, which may be secrets."""
    parts = urlsplit(url)
    return urlunsplit(SplitResult(parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


# ----------------------------------------
# Files on web servers, read by ranges over connections that stay open.


_MOVED = (301, 302, 303, 307, 308)
_MOST_MOVES = 5
_TEMPORARY = (408, 425, 429, 500, 502, 503, 504)
_MOST_WHOLE = 2**31  # bytes of a file that is read at once, such as a manifest


@dataclass(frozen=True)
class _Answer:
    status: int
    reason: str
    headers: Mapping[str, str]
    body: bytes


class HttpFiles:
    """Reads http and https URLs. One connection for each process, thread and server, because opening one costs as much as a sample."""

    def __init__(self, settings: RemoteSettings) -> None:
        self._settings = settings
        self._local = threading.local()

    def __reduce__(self) -> tuple[type[HttpFiles], tuple[RemoteSettings]]:
        return HttpFiles, (self._settings,)  # a worker process opens its own

    def size(self, url: str) -> int:
        """Bytes of a file, asked for with its first byte: what is answered so can be read by ranges."""
        return patiently(lambda: self._range(url, 0, 1)[1], url, self._settings)

    def read(self, url: str, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset` on. Raises DataError where the file is not there, may not be read, or the server stays ill."""
        return patiently(lambda: self._range(url, offset, size)[0], url, self._settings) if size else b""

    def whole(self, url: str) -> bytes:
        """The whole file, of moderate size."""
        return patiently(lambda: self._get(url, {}, _MOST_WHOLE).body, url, self._settings)

    def _range(self, url: str, offset: int, size: int) -> tuple[bytes, int]:
        """The bytes, and how many the whole file has."""
        answer = self._get(url, {"Range": f"bytes={offset}-{offset + size - 1}"}, size)
        found = re.fullmatch(r"bytes ([0-9]{1,19})-[0-9]+/([0-9]{1,19})", answer.headers.get("content-range", ""))
        if answer.status != 206 or found is None or int(found[1]) != offset:
            raise DataError(
                f"{redacted(url)} is on a server that reads no ranges (it answered {answer.status}); copy the shards to a disk, or to another server"
            )
        if len(answer.body) != size:
            raise Passing(f"{len(answer.body)} of {size} bytes came")
        return answer.body, int(found[2])

    def _get(self, url: str, headers: Mapping[str, str], size: int) -> _Answer:
        at = url
        for _ in range(_MOST_MOVES + 1):
            answer = self._once(at, headers, size)
            if answer.status in _MOVED and "location" in answer.headers:
                at = urljoin(at, answer.headers["location"])
                if urlsplit(at).scheme not in ("http", "https"):
                    raise DataError(f"{redacted(url)} was moved to {redacted(at)}, which is not on the web; give the URL of the shards themselves")
                continue
            return _checked(answer, url)
        raise DataError(f"{redacted(url)} is moved on more than {_MOST_MOVES} times; give the URL of the shards themselves")

    def _once(self, url: str, headers: Mapping[str, str], size: int) -> _Answer:
        parts = urlsplit(url)
        connection = self._connection(parts)
        is_used = connection.sock is not None
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        try:
            connection.request("GET", target, headers={"Accept-Encoding": "identity", **_login(parts), **headers})
            response = connection.getresponse()
            body = response.read(size + 1)  # a server that ignores the range may send a whole shard
            if response.length:  # more of it, or the end of a connection that broke
                self._close(parts)
                if len(body) < size:
                    raise Passing(f"{len(body)} of {len(body) + response.length} bytes came")
        except TimeoutError as error:
            self._close(parts)
            raise Passing(f"nothing came for {self._settings.timeout:g} s") from error
        except (OSError, http.client.HTTPException) as error:
            self._close(parts)
            if is_used:  # servers close connections that rest for a while
                return self._once(url, headers, size)
            raise Passing(f"{type(error).__name__} {error}".strip()) from error
        return _Answer(response.status, response.reason, {name.lower(): value for name, value in response.getheaders()}, body)

    def _connection(self, parts: SplitResult) -> http.client.HTTPConnection:
        if getattr(self._local, "process", None) != os.getpid():  # those of a parent process are the parent's
            self._local.process, self._local.open = os.getpid(), {}
        found: dict[tuple[str, str], http.client.HTTPConnection] = self._local.open
        place = (parts.scheme, parts.netloc)
        if place not in found:
            kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
            found[place] = kind(parts.netloc.rpartition("@")[2], timeout=self._settings.timeout)
        return found[place]

    def _close(self, parts: SplitResult) -> None:
        connection = self._local.open.pop((parts.scheme, parts.netloc), None)
        if connection is not None:
            connection.close()


def _checked(answer: _Answer, url: str) -> _Answer:
    answered = f"the server answered {answer.status} {answer.reason}".strip()
    if answer.status in _TEMPORARY:
        wait = answer.headers.get("retry-after", "")
        raise Passing(answered, wait=float(wait) if wait.isdecimal() else 0.0)
    if answer.status in (404, 410):
        raise DataError(f"{redacted(url)} is not there ({answered}); check the URL, or put the file there again")
    if answer.status in (401, 403):
        raise DataError(f"{redacted(url)} may not be read ({answered}); is the URL signed, and is the signature still good?")
    if answer.status not in (200, 206):
        raise DataError(f"{redacted(url)} cannot be read ({answered}); expected 200 or 206")
    return answer


def _login(parts: SplitResult) -> Mapping[str, str]:
    if parts.username is None:
        return {}
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return {"Authorization": "Basic " + base64.b64encode(pair.encode()).decode()}


# ----------------------------------------
# Files wherever fsspec reads: s3://, gs://, hf:// and others, each with a package of its own.


_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "hf": "huggingface_hub"}


class FsspecFiles:
    """Reads URLs through fsspec, which keeps its own connections for each process."""

    def __init__(self, settings: RemoteSettings) -> None:
        self._settings = settings

    def size(self, url: str) -> int:
        """Bytes of a file."""
        return int(self._patiently(url, lambda files, path: files.size(path)))

    def read(self, url: str, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset` on."""

        def read(files: Any, path: str) -> bytes:
            data: bytes = files.cat_file(path, start=offset, end=offset + size)
            if len(data) != size:
                raise Passing(f"{len(data)} of {size} bytes came")
            return data

        found: bytes = self._patiently(url, read)
        return found

    def whole(self, url: str) -> bytes:
        """The whole file, of moderate size."""
        found: bytes = self._patiently(url, lambda files, path: files.cat_file(path))
        return found

    def _patiently(self, url: str, act: Any) -> Any:
        files, path = _opened(url)

        def once() -> Any:
            try:
                return act(files, path)
            except (FileNotFoundError, IsADirectoryError) as error:
                raise DataError(f"{redacted(url)} is not there; check the URL, or put the file there again") from error
            except PermissionError as error:
                raise DataError(f"{redacted(url)} may not be read ({error}); are the credentials set as {_package(url)} wants them?") from error
            except OSError as error:
                raise Passing(f"{type(error).__name__} {error}".strip()) from error

        return patiently(once, url, self._settings)


def _opened(url: str) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs  # type: ignore[import-untyped]
    except ImportError as error:
        raise ConfigError(f"{redacted(url)} needs a package that is not here: pip install 'adalink[remote]'") from error
    if "::" in url:  # fsspec would unpack, or read one file by what another says
        raise ConfigError(f"{redacted(url)} is a chain of URLs, which is not supported; give the URL of the folder of shards itself")
    try:
        files, path = url_to_fs(url)
    except ImportError as error:
        raise ConfigError(f"{redacted(url)} needs a package that is not here: pip install {_package(url)}") from error
    except ValueError as error:
        raise ConfigError(f"{redacted(url)} is of a kind that is not known ({error}); give a folder, or an http, https, s3, gs or hf URL") from error
    return files, path


def _package(url: str) -> str:
    scheme = url.partition("://")[0].lower()
    return _PACKAGES.get(scheme, f"the fsspec package for {scheme}")


# ----------------------------------------
# Whole shards on the local disk, fetched in the background while their first samples are read from the server.
#
# A run reads all its shards evenly, so putting one out to take another in gains nothing: shards of this set stay until the folder is full, and
# the rest is read from the server. Shards of other sets make room, the least recently used first.


_CHUNK = 2**23  # bytes of one read from the server
_LOG = logging.getLogger("adalink")
_NOT_CACHED = "adalink: %s is not stored in the cache %s: %s"


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
                _LOG.warning(_NOT_CACHED, redacted(url), self._folder, f"{error.strerror}; its samples are read from the server; is the disk full?")
            except DataError as error:
                _LOG.warning(_NOT_CACHED, redacted(url), self._folder, error)
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
