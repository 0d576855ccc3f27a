"""What a request may cost before anybody looks at it: how many at once, how many bytes, how long."""

from __future__ import annotations

import asyncio

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tasks.serve.refusal import Refused
from tasks.serve.settings import RequestLimits

__all__ = ["BodyGuard"]

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
            raise Refused(413, f"the body has more than {limits.body_bytes} bytes, the limit: send a smaller picture", code="too_many_bytes")
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
            raise Refused(408, f"the body did not arrive within {seconds:g} seconds: send it faster, or a smaller picture", code="too_slow") from None
        self._complete = message["type"] == "http.disconnect" or not message.get("more_body", False)
        return message
