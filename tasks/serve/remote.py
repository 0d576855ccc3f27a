"""Pictures from addresses: only from hosts that the operator allows, never from a private network, with limits on bytes and time."""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from urllib.parse import SplitResult, urlsplit

from tasks.serve.refusal import Refused

__all__ = ["RemotePictures", "is_public"]

SECONDS = 10.0  # for all of one fetch
BLOCK = 65_536


def is_public(address: str) -> bool:
    """Whether an IP address belongs to a host on the internet, and not to this machine, its networks or anything reserved."""
    found = ipaddress.ip_address(address)
    inner = found.ipv4_mapped or found.sixtofour if isinstance(found, ipaddress.IPv6Address) else None
    return found.is_global and not found.is_multicast and (inner is None or inner.is_global)


class RemotePictures:
    """Fetches pictures. A name is resolved once and that very address is connected to, so a name cannot change in between.

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
            address = self._resolved(host, port, field)
            with socket.create_connection((address, port), timeout=self._left(deadline)) as plain:
                stream = ssl.create_default_context().wrap_socket(plain, server_hostname=host) if parts.scheme == "https" else plain
                return self._read(stream, parts, deadline, field)
        except TimeoutError:
            raise Refused(400, f"{field}: {host} did not send the picture within {self.seconds:g} seconds", field=field, code="fetch_failed") from None
        except (OSError, http.client.HTTPException) as error:
            raise Refused(400, f"{field}: the picture could not be fetched from {host}: {error}", field=field, code="fetch_failed") from None

    def _checked(self, url: str, field: str) -> tuple[SplitResult, str, int]:
        if not self.hosts:
            raise Refused(400, f"{field}: this server fetches no pictures: send a data URL, or upload the file", field=field, code="remote_not_allowed")
        try:
            parts = urlsplit(url)
            host, port = (parts.hostname or "").lower(), parts.port
        except ValueError as error:
            raise Refused(400, f"{field} is no address: {error}", field=field) from None
        if not host or parts.username is not None or any(ord(letter) < 33 or ord(letter) > 126 for letter in url):
            raise Refused(400, f"{field} is {url[:60]!r}: expected https://HOST/PATH in ASCII, without a user name", field=field)
        if "*" not in self.hosts and host not in self.hosts:
            raise Refused(400, f"{field}: this server fetches no pictures from {host[:60]}: send a data URL", field=field, code="remote_not_allowed")
        return parts, host, port or (443 if parts.scheme == "https" else 80)

    def _resolved(self, host: str, port: int, field: str) -> str:
        """The first address of a host. Raises Refused where any of its addresses is private."""
        found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        if not all(self.reachable(address.partition("%")[0]) for address in found):
            raise Refused(400, f"{field}: {host[:60]} is not on the public internet", field=field, code="remote_not_allowed")
        return found[0]

    def _read(self, stream: socket.socket, parts: SplitResult, deadline: float, field: str) -> bytes:
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        stream.settimeout(self._left(deadline))
        stream.sendall(f"GET {path} HTTP/1.1\r\nHost: {parts.netloc}\r\nAccept: image/*\r\nUser-Agent: adalink\r\nConnection: close\r\n\r\n".encode())
        response = http.client.HTTPResponse(stream, method="GET")
        response.begin()
        if response.status != 200:
            raise Refused(400, f"{field}: {parts.hostname} answered {response.status}, expected 200 and a picture", field=field, code="fetch_failed")
        data = bytearray()
        while block := response.read1(BLOCK):
            data += block
            if len(data) > self.most_bytes:
                raise Refused(413, f"{field}: the picture has more than {self.most_bytes} bytes, the limit", field=field, code="too_many_bytes")
            stream.settimeout(self._left(deadline))
        return bytes(data)

    def _left(self, deadline: float) -> float:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left
