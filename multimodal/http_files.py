"""Files on web servers, read by ranges over connections that stay open."""

from __future__ import annotations

import base64
import http.client
import os
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import SplitResult, unquote, urljoin, urlsplit

from adalink.errors import DataError
from multimodal.remote import Passing, RemoteSettings, patiently, shown

__all__ = ["HttpFiles"]

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
            raise DataError(f"{shown(url)} is on a server that reads no ranges (it answered {answer.status}); copy the shards to a disk, or to another server")
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
                    raise DataError(f"{shown(url)} was moved to {shown(at)}, which is not on the web; give the URL of the shards themselves")
                continue
            return _checked(answer, url)
        raise DataError(f"{shown(url)} is moved on more than {_MOST_MOVES} times; give the URL of the shards themselves")

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
    said = f"the server answered {answer.status} {answer.reason}".strip()
    if answer.status in _TEMPORARY:
        wait = answer.headers.get("retry-after", "")
        raise Passing(said, wait=float(wait) if wait.isdecimal() else 0.0)
    if answer.status in (404, 410):
        raise DataError(f"{shown(url)} is not there ({said}); check the URL, or put the file there again")
    if answer.status in (401, 403):
        raise DataError(f"{shown(url)} may not be read ({said}); is the URL signed, and is the signature still good?")
    if answer.status not in (200, 206):
        raise DataError(f"{shown(url)} cannot be read ({said}); expected 200 or 206")
    return answer


def _login(parts: SplitResult) -> Mapping[str, str]:
    if parts.username is None:
        return {}
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return {"Authorization": "Basic " + base64.b64encode(pair.encode()).decode()}
