"""HTTP connections on which a client must send its request's header in time, and no more of them than the process has room for."""

from __future__ import annotations

import asyncio
import contextlib
import resource
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["BACKLOG", "patient_protocol", "room_for_connections"]

TOO_SLOW = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
TOO_MANY = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
# Connections that are accepted at once, before any of them is looked at; asyncio fills the log where there is no descriptor left for one.
BACKLOG = 128
OTHER_FILES = 96  # descriptors that the rest of the server has: weights, decoders, pictures from elsewhere


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

    def _close(self, told: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(told)
            self.transport.close()


def patient_protocol(seconds: float, most: int) -> type[H11Protocol]:
    """The class that uvicorn's configuration takes.

    seconds   in which the header of a request must come
    most      connections at once. For one more, that one is closed which has been open longest of those that wait for a request; where all
              are being answered, the new one is told to come again
    """
    return type("Patient", (_Patient,), {"seconds": seconds, "most": most, "there": {}})
