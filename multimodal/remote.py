"""Files on servers: which names are URLs, how patiently they are read, and who reads them."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

from adalink.errors import ConfigError, DataError

__all__ = ["Passing", "RemoteFiles", "RemoteSettings", "beside", "is_url", "patiently", "shown", "unsigned"]

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
                    f"{shown(url)} cannot be read: {error}, in the last of {attempt} attempts over {spent:.0f} s; "
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


def shown(url: str) -> str:
    """The URL for a message: without password and query, which may be secrets."""
    parts = urlsplit(url)
    return urlunsplit(SplitResult(parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
