"""What a request must pass before it is read: how many at once, how many bytes, how long, under which name, with which key."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import ipaddress
import resource
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fastapi import Request
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from adalink.errors import ConfigError
from tasks.data.files import text_lines
from tasks.serve.errors import Refused
from tasks.serve.settings import RequestLimits, ServeSettings

__all__ = ["BACKLOG", "BodyGuard", "Keys", "OriginGuard", "check_json", "patient_protocol", "room_for_connections"]


DISCARDED = 4  # times the limit of a body: so much of a larger one is read and thrown away, so that its sender gets to read the answer


class BodyGuard:
    """ASGI middleware for requests with a body: counts them, and hands the body on only as long as it is within the limits."""

    def __init__(self, app: ASGIApp, limits: RequestLimits) -> None:
        self.app = app
        self.limits = limits
        self.n_requests = 0
        self.n_bytes = 0  # of all bodies that are held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 429."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS", "DELETE"):
            await self.app(scope, receive, send)
            return
        body = _GuardedBody(self, receive)
        try:
            if self.n_requests >= self.limits.in_flight:
                raise Refused(429, f"{self.limits.in_flight} requests are in work, the limit: try again in a moment", code="queue_full")
            self.n_requests += 1
            try:
                await self.app(scope, body.receive, send)
            finally:
                self.n_requests -= 1
                self.n_bytes -= body.n_bytes
        except Refused as refused:
            await body.discard()
            await JSONResponse(refused.content, refused.status, refused.headers)(scope, receive, send)


class _GuardedBody:
    """The body of one request."""

    def __init__(self, guard: BodyGuard, receive: Receive) -> None:
        self.guard = guard
        self.n_bytes = 0
        self._receive = receive
        self._deadline = asyncio.get_running_loop().time() + guard.limits.seconds
        self._complete = False

    async def receive(self) -> Message:
        """The next message of the server. Raises Refused where the body is too large or too slow."""
        if self._complete:
            return await self._receive()  # nothing more to come but the client's leaving
        limits = self.guard.limits
        message = await self._within_time()
        length = len(message.get("body", b""))
        self.n_bytes += length
        self.guard.n_bytes += length
        if self.n_bytes > limits.body_bytes:
            await self.discard()
            raise Refused(413, f"the body has more than {limits.body_bytes} bytes, the limit: send a smaller image", code="too_many_bytes")
        if self.guard.n_bytes > limits.buffered_bytes:
            await self.discard()
            raise Refused(429, f"{limits.buffered_bytes} bytes of requests are held, the limit: try again in a moment", code="queue_full")
        return message

    async def discard(self) -> None:
        """Read what is left of the body and keep nothing, within bounds."""
        most, read = DISCARDED * self.guard.limits.body_bytes, 0
        try:
            while not self._complete and read < most:
                read += len((await self._within_time()).get("body", b""))
        except Refused:
            return

    async def _within_time(self) -> Message:
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            seconds = self.guard.limits.seconds
            raise Refused(408, f"the body did not arrive within {seconds:g} seconds: send it faster, or a smaller image", code="too_slow") from None
        self._complete = message["type"] == "http.disconnect" or not message.get("more_body", False)
        return message


# ----------------------------------------
# HTTP connections on which a client must send its request's header in time, and no more of them than the process has room for.


TOO_SLOW = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
TOO_MANY = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
# Connections that are accepted at once, before any of them is looked at; asyncio fills the log where there is no descriptor left for one.
BACKLOG = 128
OTHER_FILES = 96  # descriptors that the rest of the server has: weights, decoders, images from elsewhere


def room_for_connections(wanted: int) -> int:
    """How many connections there may be, at most `wanted`: the limit of open files is raised for them as far as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + BACKLOG + OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed if hard == resource.RLIM_INFINITY else min(needed, hard), hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return wanted if soft == resource.RLIM_INFINITY else max(min(wanted, soft - BACKLOG - OTHER_FILES), 16)


class _Patient(H11Protocol):
    """uvicorn's protocol, which by itself waits forever for a header that never ends."""

    seconds: float
    most: int
    there: dict[_Patient, None]  # in the order in which they came
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.there) >= self.most:
            waiting = next((other for other in self.there if other._waits()), self)
            self.there.pop(waiting, None)
            waiting._close(TOO_MANY if waiting.cycle is None else b"")  # or it may have just asked again
            if waiting is self:
                return
        self.there[self] = None
        self._timer = self.loop.call_later(self.seconds, self._give_up)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self._waits() and self._timer is not None:
            self._timer.cancel()
            self._timer = None
        elif self._waits() and self._timer is None:  # a second request on the same connection has begun and has not arrived
            self._timer = self.loop.call_later(self.seconds, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        self.there.pop(self, None)
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def _waits(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _give_up(self) -> None:
        if self._waits():
            self._close(TOO_SLOW)

    def _close(self, note: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(note)
            self.transport.close()


def patient_protocol(seconds: float, most: int) -> type[H11Protocol]:
    """The class that uvicorn's configuration takes.

    seconds   in which the header of a request must come
    most      connections at once. For one more, that one is closed which has been open longest of those that wait for a request; where all
              are being answered, the new one is asked to come again
    """
    return type("Patient", (_Patient,), {"seconds": seconds, "most": most, "there": {}})


# ----------------------------------------
# Which names a server answers to, and which web pages may use it: a page in a browser can reach whatever the browser's machine can reach.


CHANGES_NOTHING = ("GET", "HEAD", "OPTIONS")


class OriginGuard:
    """ASGI middleware: refuses a request under another name than the server's (DNS rebinding), and one that another web page makes.

    Names are those of `access.hosts`, `host` and the loopback; an address is no name, and cannot be bound to another machine. A page of
    `access.origins` may do what a program may; any other, not even what a browser lets it do without asking.
    """

    def __init__(self, app: ASGIApp, settings: ServeSettings) -> None:
        self.app = app
        self.hosts = {name.lower().rstrip(".") for name in ("localhost", settings.host, *settings.access.hosts)}
        if settings.host in ("0.0.0.0", "::"):
            self.hosts.add(socket.gethostname().lower())
        self.origins = {origin.lower().rstrip("/") for origin in settings.access.origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer 403."""
        try:
            if scope["type"] == "http":
                self._check(Headers(scope=scope), scope["method"])
        except Refused as refused:
            await JSONResponse(refused.content, refused.status)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _check(self, headers: Headers, method: str) -> None:
        host, origin = headers.get("host", ""), headers.get("origin")
        name = _name(host)
        if "*" not in self.hosts and name not in self.hosts and not _is_address(name):
            note = f"the host {name[:60]!r} is not a name of this server: ask under its own, or start it with --access.hosts"
            raise Refused(403, note, field="host", code="wrong_host")
        if origin is None or method in CHANGES_NOTHING or "*" in self.origins or origin.lower() in self.origins:
            return
        if urlsplit(origin).netloc.lower() != host.lower():
            note = f"pages of {origin[:60]!r} may not use this server: start it with --access.origins to allow them"
            raise Refused(403, note, field="origin", code="wrong_origin")


def check_json(content_type: str) -> None:
    """Raise Refused unless a body is JSON: other types are what a foreign page can send without being asked."""
    kind = content_type.partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        note = f"the content type is {kind[:60]!r}" if kind else "there is no content type"
        raise Refused(415, f"{note}, expected application/json: send the body as JSON", field="content-type", code="not_json")


def _name(host: str) -> str:
    """A Host header without its port; an IPv6 address without brackets."""
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return host.lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


# ----------------------------------------
# Keys that requests must carry, where the operator set any.


class Keys:
    """Checks `Authorization: Bearer KEY`. Give the object to FastAPI as a dependency. Without keys everyone may pass."""

    def __init__(self, path: Path | None) -> None:
        self.keys = _read(path) if path is not None else ()

    def __call__(self, request: Request) -> None:
        """Raise Refused for a request without one of the keys; note in its state whose it is."""
        request.state.owner = ""
        if not self.keys:
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not given.strip():
            raise Refused(401, "a key is needed: send the header `Authorization: Bearer KEY`", field="authorization", code="missing_key")
        # Every key is compared, each in the same time, so that the time reveals nothing. Headers are read as latin-1, whatever they are.
        secret = given.strip().encode("latin-1")
        if not sum(hmac.compare_digest(secret, key) for key in self.keys):
            raise Refused(401, "the key is not one of this server's: ask its operator for one", field="authorization", code="wrong_key")
        request.state.owner = hashlib.sha256(secret).hexdigest()


def _read(path: Path) -> tuple[bytes, ...]:
    try:
        keys = tuple(line.encode() for line in text_lines(path.read_text(encoding="utf-8-sig")) if not line.startswith("#"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the file of keys {path} cannot be read: {error}") from None
    if not keys:
        raise ConfigError(f"the file of keys {path} holds none: write one key a line, or leave the setting out")
    return keys
