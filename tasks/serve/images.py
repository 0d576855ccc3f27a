"""Images that a request names: at an address, of hosts that the operator allows, never on a private network, within limits of bytes and time; or uploaded."""

from __future__ import annotations

import http.client
import io
import ipaddress
import queue
import secrets
import socket
import ssl
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import SplitResult, urlsplit

from tasks.serve.errors import Refused

__all__ = ["RemoteImages", "Upload", "Uploads", "is_public"]


SECONDS = 10.0  # for all of one fetch: the name, the connection, the header and the body, however slowly each of their bytes comes
BLOCK = 65_536
# Where hosts of the internet are. Not in it: what stands for an IPv4 address, which may be a private one (::/96, NAT64's 64:ff9b::/96 and
# 64:ff9b:1::/48), site-local addresses (fec0::/10), and all that is reserved. In it, and known to Python as such: Teredo.
UNICAST = ipaddress.IPv6Network("2000::/3")
DOCUMENTATION = ipaddress.IPv6Network("3fff::/20")
RELAY = ipaddress.IPv4Network("192.88.99.0/24")


def is_public(address: str) -> bool:
    """Whether an IP address belongs to a host on the internet, and not to this machine, its networks or anything reserved."""
    found = ipaddress.ip_address(address)
    if isinstance(found, ipaddress.IPv4Address):
        return found.is_global and not found.is_multicast and found not in RELAY
    if found.ipv4_mapped is not None:
        return is_public(str(found.ipv4_mapped))
    if found not in UNICAST or found in DOCUMENTATION or not found.is_global:
        return False
    return found.sixtofour is None or is_public(str(found.sixtofour))


class RemoteImages:
    """Fetches images. A name is resolved once and that very address is connected to, so a name cannot change in between.

    hosts      allowed host names; "*" for every public one
    reachable  whether an address may be connected to
    """

    def __init__(self, hosts: Sequence[str], most_bytes: int, *, seconds: float = SECONDS, reachable: Callable[[str], bool] = is_public) -> None:
        self.hosts = frozenset(host.lower() for host in hosts)
        self.most_bytes = most_bytes
        self.seconds = seconds
        self.reachable = reachable

    def fetch(self, url: str, field: str) -> bytes:
        """The bytes at an address; redirects are not followed. Raises Refused."""
        parts, host, port = self._checked(url, field)
        deadline = time.monotonic() + self.seconds
        try:
            address = self._resolved(host, port, deadline, field)
            with socket.create_connection((address, port), timeout=_left(deadline)) as plain:
                plain.settimeout(_left(deadline))
                stream = ssl.create_default_context().wrap_socket(plain, server_hostname=host) if parts.scheme == "https" else plain
                return self._read(stream, parts, deadline, field)
        except TimeoutError:
            raise Refused(400, f"{field}: {host} did not send the image within {self.seconds:g} seconds", field=field, code="fetch_failed") from None
        except (OSError, http.client.HTTPException) as error:  # never the reply of a service that is no web server
            note = (error.strerror or "the connection failed") if isinstance(error, OSError) else "what it sent is no HTTP"
            raise Refused(400, f"{field}: the image could not be fetched from {host}: {note}", field=field, code="fetch_failed") from None

    def _checked(self, url: str, field: str) -> tuple[SplitResult, str, int]:
        if not self.hosts:
            raise Refused(400, f"{field}: this server fetches no images: send a data URL, or upload the file", field=field, code="remote_not_allowed")
        try:
            parts = urlsplit(url)
            host, port = (parts.hostname or "").lower(), parts.port
        except ValueError as error:
            raise Refused(400, f"{field} is no address: {error}", field=field) from None
        if not host or parts.username is not None or any(ord(letter) < 33 or ord(letter) > 126 for letter in url):
            raise Refused(400, f"{field} is {url[:60]!r}: expected https://HOST/PATH in ASCII, without a user name", field=field)
        if "*" not in self.hosts and host not in self.hosts:
            raise Refused(400, f"{field}: this server fetches no images from {host[:60]}: send a data URL", field=field, code="remote_not_allowed")
        return parts, host, port or (443 if parts.scheme == "https" else 80)

    def _resolved(self, host: str, port: int, deadline: float, field: str) -> str:
        """The first address of a host. Raises Refused where any of its addresses is private."""
        found = _addresses(host, port, deadline)
        if not all(self.reachable(address.partition("%")[0]) for address in found):
            raise Refused(400, f"{field}: {host[:60]} is not on the public internet", field=field, code="remote_not_allowed")
        return found[0]

    def _read(self, stream: socket.socket, parts: SplitResult, deadline: float, field: str) -> bytes:
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        stream.settimeout(_left(deadline))
        stream.sendall(f"GET {path} HTTP/1.1\r\nHost: {parts.netloc}\r\nAccept: image/*\r\nUser-Agent: adalink\r\nConnection: close\r\n\r\n".encode())
        response = http.client.HTTPResponse(_InTime(stream, deadline), method="GET")  # type: ignore[arg-type]  # all of a socket that it uses
        response.begin()
        if response.status != 200:
            raise Refused(400, f"{field}: {parts.hostname} answered {response.status}, expected 200 and an image", field=field, code="fetch_failed")
        data = bytearray()
        while block := response.read1(BLOCK):
            data += block
            if len(data) > self.most_bytes:
                raise Refused(413, f"{field}: the image has more than {self.most_bytes} bytes, the limit", field=field, code="too_many_bytes")
        return bytes(data)


class _InTime(io.RawIOBase):
    """A socket as a file that is read until a time and no longer, in whatever pieces it comes: a socket's own timeout begins anew with each."""

    def __init__(self, stream: socket.socket, deadline: float) -> None:
        self.stream = stream
        self.deadline = deadline

    def makefile(self, mode: str) -> io.BufferedReader:
        """As `socket.makefile`."""
        return io.BufferedReader(self)

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Bytes that were read. Raises TimeoutError."""
        self.stream.settimeout(_left(self.deadline))
        return self.stream.recv_into(buffer)


def _addresses(host: str, port: int, deadline: float) -> list[str]:
    """All addresses of a host, asked for in a thread that is left alone where no answer comes in time: a resolver has no timeout to set."""
    answer: queue.SimpleQueue[list[str] | OSError] = queue.SimpleQueue()

    def resolve() -> None:
        try:
            answer.put([str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)])
        except (OSError, UnicodeError) as error:
            answer.put(error if isinstance(error, OSError) else OSError(0, "the name is none"))

    threading.Thread(target=resolve, name="resolver", daemon=True).start()
    try:
        found = answer.get(timeout=_left(deadline))
    except queue.Empty:
        raise TimeoutError from None
    if isinstance(found, OSError):
        raise found
    return found


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


# ----------------------------------------
# Images that were uploaded, in memory; the oldest make room for new ones.


@dataclass(frozen=True)
class Upload:
    """One uploaded image. Its id cannot be guessed, so only who uploaded it can ask about it."""

    name: str
    data: bytes
    id: str = field(default_factory=lambda: f"file-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))


class Uploads:
    """Uploaded images by id, at most `most_bytes` of them. Used by the event loop alone."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self._retained: OrderedDict[str, Upload] = OrderedDict()
        self._n_bytes = 0

    def add(self, upload: Upload) -> None:
        """Store one more. Raises Refused where it is larger than the limit of all together."""
        if len(upload.data) > self.most_bytes:
            raise Refused(413, f"the image has {len(upload.data)} bytes, and {self.most_bytes} are stored of all uploads together", field="file")
        self._retained[upload.id] = upload
        self._n_bytes += len(upload.data)
        while self._n_bytes > self.most_bytes:
            self._n_bytes -= len(self._retained.popitem(last=False)[1].data)

    def get(self, file_id: str, field: str) -> Upload:
        """The upload of an id. Raises Refused where it is not stored, or not any more."""
        if file_id not in self._retained:
            raise Refused(404, f"{field} is {file_id[:60]!r}, which is not stored (any more): upload the image again", field=field, code="file_not_found")
        self._retained.move_to_end(file_id)
        return self._retained[file_id]

    def remove(self, file_id: str) -> None:
        """Remove one. Raises Refused where it is not stored."""
        self._n_bytes -= len(self.get(file_id, "file_id").data)
        del self._retained[file_id]
