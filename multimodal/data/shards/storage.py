"""Files on servers: which names are URLs, and how they are read over HTTP or by fsspec."""

from __future__ import annotations

import base64
import http.client
import logging
import math
import os
import re
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit, urlunsplit

from adalink.errors import ConfigError, DataError

__all__ = [
    "FsspecFiles", "HttpFiles", "Passing", "RemoteFiles", "RemoteSettings", "beside", "is_url", "once_in_a_while", "patiently",
    "redacted", "remote_files", "scrubbed", "unsigned",
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
_SILENCE = 60.0  # seconds between two lines of the log about one server
_LOG = logging.getLogger("adalink")


@dataclass(frozen=True, kw_only=True)
class RemoteSettings:
    """How shards on servers are read.

    The cache is shared by all processes of a machine, and the numbers hold for all of them together.
    """

    cache: Path | None = None  # a folder for whole shards; none: each sample is read from the server each time
    cache_bytes: int = 50 * 2**30  # most that the folder may hold
    ahead: int = 2  # windows of shards that are fetched before they are read, as far as the cache has room
    connections: int = 8  # most shards that are fetched at a time
    attempts: int = 6  # of one read, with pauses that double
    first_wait: float = 0.5  # seconds before the second attempt: 0.5, 1, 2, 4, 8 are 15.5 in all
    timeout: float = 30.0  # seconds without a byte after which an attempt has failed

    def __post_init__(self) -> None:
        """Check what a caller can get wrong."""
        if min(self.attempts, self.connections) < 1 or min(self.cache_bytes, self.ahead) < 0 or not self.first_wait >= 0 or not self.timeout > 0:
            raise ConfigError(
                f"{self}: attempts are 1 or more, and so are connections; cache_bytes, ahead and first_wait are 0 or more, and the timeout is a "
                "positive number of seconds"
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

    def pieces(self, url: str, offset: int, size: int) -> Generator[bytes]:
        """The bytes from `offset` to the end of a file of `size`, as they come, at one attempt: raises Passing as well."""
        ...


class Passing(Exception):
    """A failure that another attempt may not meet; the text completes `the file URL cannot be read: `."""

    def __init__(self, what: str, wait: float = 0.0, is_silence: bool = False) -> None:
        super().__init__(what)
        self.wait = wait  # seconds that the server asked for
        self.is_silence = is_silence  # whether no byte came in time


def patiently(read: Callable[[], T], url: str, settings: RemoteSettings) -> T:
    """What `read` gives, at the first attempt that does not raise Passing. Raises DataError after the last."""
    started, wait = time.monotonic(), settings.first_wait
    for attempt in range(1, settings.attempts + 1):
        try:
            return read()
        except Passing as error:
            if attempt > 1:
                once_in_a_while(url, f"reading waits for {redacted(url)}: {error} (attempt {attempt} of {settings.attempts})")
            if attempt == settings.attempts:
                spent = time.monotonic() - started
                raise DataError(
                    f"{redacted(url)} cannot be read: {error}, in the last of {attempt} attempts over {spent:.0f} s; "
                    "is the server well? --resume goes on with the next sample"
                ) from error
            time.sleep(min(max(wait, error.wait), _LONGEST_WAIT))
            wait *= 2
    raise AssertionError("there is at least one attempt")


_NAMED: dict[str, float] = {}  # when a server was last named in the log


def once_in_a_while(url: str, sentence: str) -> None:
    """A warning about a server, unless there was one in the last minute: thousands of reads may wait for the same reason."""
    place = _host(urlsplit(url).netloc)
    now = time.monotonic()
    if now - _NAMED.get(place, -_SILENCE) >= _SILENCE:
        _NAMED[place] = now
        _LOG.warning("adalink: %s", sentence)


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
    return urlunsplit(SplitResult(parts.scheme, _host(parts.netloc), parts.path, "", ""))


def scrubbed(text: object, url: str) -> str:
    """What a library reports about a URL, for a message: every URL in it `redacted`, and what is secret in this one replaced by `***`."""
    found = _IN_TEXT.sub(lambda match: redacted(match[0]), str(text))
    parts = urlsplit(url)
    login = parts.netloc.rpartition("@")[0]
    values = [pair.partition("=")[2] for pair in parts.query.split("&")]
    secrets = {parts.query, parts.fragment, login, *login.split(":", 1)[1:], *(value for value in values if len(value) > 3)}
    for secret in sorted({form for each in secrets if each for form in (each, unquote(each), quote(each, safe=""))}, key=len, reverse=True):
        found = found.replace(secret, "***")
    return found


_IN_TEXT = re.compile(r"[a-z][a-z0-9+.-]*://[^\s'\"<>]+", re.IGNORECASE)


def _host(netloc: str) -> str:
    """Host and port. A password with `?`, `#` or `/` in it ends the host early: what is then no port is a part of the password."""
    host = netloc.rpartition("@")[2]
    name, colon, port = host.rpartition(":")
    return f"{name}:***" if colon and port and not port.isdecimal() and not host.endswith("]") else host


# ----------------------------------------
# Files on web servers, read by ranges over connections that stay open.


_MOVED = (301, 302, 303, 307, 308)
_MOST_MOVES = 5
_TEMPORARY = (408, 425, 429, 500, 502, 503, 504)
_MOST_WHOLE = 2**31  # bytes of a file that is read at once, such as a manifest
_MOST_ERROR = 2**16  # bytes of a page about an error that are read to use the connection again
_PIECE = 2**17 - 64  # bytes that are read at a time from a connection: for more the allocator asks the system for new pages each time


@dataclass(frozen=True)
class _Answer:
    status: int
    reason: str
    headers: Mapping[str, str]
    body: bytes
    response: http.client.HTTPResponse
    parts: SplitResult  # of the URL that answered


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

    def pieces(self, url: str, offset: int, size: int) -> Generator[bytes]:
        """One request for the rest of the file: latency is paid once, however many bytes there are."""
        answer = self._get(url, {"Range": f"bytes={offset}-{size - 1}"}, None)
        try:
            if (found := _ranged(answer, url, offset)) != size:
                raise DataError(f"{redacted(url)} has {found} bytes, and the manifest says {size}: it was replaced; write the manifest again")
            while offset < size:
                with self._named(url):
                    data = answer.response.read1(min(_PIECE, size - offset))  # what there is
                if not data:
                    raise Passing(f"the connection ended with {size - offset} bytes to come")
                offset += len(data)
                yield data
        finally:
            if not answer.response.isclosed():
                self._close(answer.parts)

    def _range(self, url: str, offset: int, size: int) -> tuple[bytes, int]:
        """The bytes, and how many the whole file has."""
        answer = self._get(url, {"Range": f"bytes={offset}-{offset + size - 1}"}, size)
        whole = _ranged(answer, url, offset)
        if len(answer.body) != size:
            raise Passing(f"{len(answer.body)} of {size} bytes came")
        return answer.body, whole

    def _get(self, url: str, headers: Mapping[str, str], size: int | None) -> _Answer:
        """size: of the body, which is read; None: it is left to be read where the server gives it."""
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

    def _once(self, url: str, headers: Mapping[str, str], size: int | None) -> _Answer:
        parts = urlsplit(url)
        with self._named(url):
            connection = self._connection(parts)
        is_used = connection.sock is not None
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        try:
            with self._named(url):
                connection.request("GET", target, headers={"Accept-Encoding": "identity", **_login(parts), **headers})
                response = connection.getresponse()
                is_left = size is None and response.status == 206
                most = _MOST_ERROR if size is None else size
                body = b"" if is_left else response.read(most + 1)  # a server that ignores the range may send a whole shard
        except Passing as error:
            self._close(parts)
            if is_used and not error.is_silence:  # servers close connections that rest for a while
                return self._once(url, headers, size)
            raise
        if response.length and not is_left:  # more of it, or the end of a connection that broke
            self._close(parts)
            if len(body) < most:
                raise Passing(f"{len(body)} of {len(body) + response.length} bytes came")
        return _Answer(response.status, response.reason, {name.lower(): value for name, value in response.getheaders()}, body, response, parts)

    @contextmanager
    def _named(self, url: str) -> Iterator[None]:
        """What a connection raises, as Passing; the error itself, which may hold the URL, is not part of it."""
        try:
            yield
        except TimeoutError:
            raise Passing(f"nothing came for {self._settings.timeout:g} s", is_silence=True) from None
        except (http.client.InvalidURL, UnicodeError):
            raise DataError(f"{redacted(url)} cannot be asked for: a URL has a host, a port and ASCII letters; write others as %20 and so on") from None
        except (OSError, http.client.HTTPException) as error:
            raise Passing(scrubbed(f"{type(error).__name__} {error}", url).strip()) from None

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


def _ranged(answer: _Answer, url: str, offset: int) -> int:
    """Bytes of the whole file, by the answer to a request for a range from `offset` on. Raises DataError where it is none."""
    found = re.fullmatch(r"bytes ([0-9]{1,19})-[0-9]+/([0-9]{1,19})", answer.headers.get("content-range", ""))
    if answer.status != 206 or found is None or int(found[1]) != offset:
        raise DataError(
            f"{redacted(url)} is on a server that reads no ranges (it answered {answer.status}); copy the shards to a disk, or to another server"
        )
    return int(found[2])


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
# Files wherever fsspec reads: s3://, gs://, az://, hf:// and others, each with a package of its own.


_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "hf": "huggingface_hub"}
_BLOCK = 2**24  # bytes of one read of a file that is read whole: a store's latency is then a small part of it
_DENIED = re.compile("credential|authenti[cf]|forbidden|unauthori[sz]ed|access ?denied", re.IGNORECASE)


class FsspecFiles:
    """Reads URLs through fsspec. One file system for each process and bucket, shared by its threads, so that connections stay open."""

    def __init__(self, settings: RemoteSettings) -> None:
        self._settings = settings
        self._open: dict[tuple[int, str], Any] = {}

    def __reduce__(self) -> tuple[type[FsspecFiles], tuple[RemoteSettings]]:
        return FsspecFiles, (self._settings,)  # a worker process opens its own

    def size(self, url: str) -> int:
        """Bytes of a file."""
        return patiently(lambda: int(self._act(url, "size")), url, self._settings)

    def read(self, url: str, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset` on."""
        return patiently(lambda: self._range(url, offset, size), url, self._settings) if size else b""

    def whole(self, url: str) -> bytes:
        """The whole file, of moderate size."""
        return patiently(lambda: bytes(self._act(url, "cat_file")), url, self._settings)

    def pieces(self, url: str, offset: int, size: int) -> Generator[bytes]:
        """Requests for 16 MiB, one after the other."""
        for at in range(offset, size, _BLOCK):
            yield self._range(url, at, min(_BLOCK, size - at))

    def _range(self, url: str, offset: int, size: int) -> bytes:
        data: bytes = self._act(url, "cat_file", start=offset, end=offset + size)
        if len(data) > size:
            raise DataError(f"{redacted(url)} is on a server that reads no ranges; copy the shards to a disk, or to another server")
        if len(data) != size:
            raise Passing(f"{len(data)} of {size} bytes came")
        return data

    def _act(self, url: str, what: str, **arguments: int) -> Any:
        """What a file system's function gives; what it raises becomes a sentence without the URL's secrets."""
        files, path = self._opened(url)
        try:
            return getattr(files, what)(path, **arguments)
        except (FileNotFoundError, IsADirectoryError):
            raise DataError(f"{redacted(url)} is not there; check the URL, or put the file there again") from None
        except Exception as error:  # each store's package raises errors of its own
            stated = scrubbed(f"{type(error).__name__} {error}", url).strip()
            passes = isinstance(error, (TimeoutError, ConnectionError))
            if isinstance(error, PermissionError) or (not passes and _DENIED.search(stated)):
                stated = scrubbed(error, url).strip()
                raise DataError(f"{redacted(url)} may not be read ({stated}); are the credentials set as {_package(url)} wants them?") from None
            raise Passing(stated) from None

    def _opened(self, url: str) -> tuple[Any, str]:
        place = os.getpid(), urlsplit(url)._replace(path="", fragment="").geturl()
        if place not in self._open:
            self._open[place] = _opened(url, self._settings)[0]
        return self._open[place], self._open[place]._strip_protocol(url)


def _options(url: str, settings: RemoteSettings) -> dict[str, Any]:
    """What makes a store's package read whole shards fast: enough connections, our timeout, and no attempts of its own where they can be turned off.

    Only ranges are read, which no package caches.
    """
    scheme, seconds = url.partition("://")[0].lower(), settings.timeout
    if scheme in ("s3", "s3a"):
        config = {"max_pool_connections": 2 * settings.connections, "connect_timeout": seconds, "read_timeout": seconds}
        # With one request at a time for each file it does not ask for a file's size first, which a store may forbid.
        return {"config_kwargs": {**config, "retries": {"total_max_attempts": 1}}, "max_concurrency": 1}
    if scheme in ("gs", "gcs"):
        return {"requests_timeout": seconds}
    if scheme in ("az", "abfs"):
        return {"connection_timeout": math.ceil(seconds), "read_timeout": math.ceil(seconds)}
    return {}


def _opened(url: str, settings: RemoteSettings) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs  # type: ignore[import-untyped]
    except ImportError as error:
        raise ConfigError(f"{redacted(url)} needs a package that is not here: pip install 'adalink[remote]'") from error
    if "::" in url:  # fsspec would unpack, or read one file by what another says
        raise ConfigError(f"{redacted(url)} is a chain of URLs, which is not supported; give the URL of the folder of shards itself")
    try:
        files, path = url_to_fs(url, **_options(url, settings))
    except ImportError as error:
        raise ConfigError(f"{redacted(url)} needs a package that is not here: pip install {_package(url)}") from error
    except ValueError as error:
        stated = scrubbed(error, url)
        raise ConfigError(f"{redacted(url)} is of a kind that is not known ({stated}); give a folder, or an http, https, s3, gs, az or hf URL") from None
    if _package(url) == "s3fs":
        files.retries = 1  # it would try five times, without a word
    return files, path


def _package(url: str) -> str:
    scheme = url.partition("://")[0].lower()
    return _PACKAGES.get(scheme, f"the fsspec package for {scheme}")


def remote_files(url: str, settings: RemoteSettings) -> RemoteFiles:
    """Who reads this URL. Raises ConfigError where it is none."""
    try:
        urlsplit(url)
    except ValueError as error:
        raise ConfigError(f"the URL of the shards cannot be understood ({error}); check its host, which has brackets where it is an IPv6 address") from None
    return HttpFiles(settings) if url.lower().startswith(("http://", "https://")) else FsspecFiles(settings)
