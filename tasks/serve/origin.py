"""Which names a server answers to, and which web pages may use it: a page in a browser can reach whatever the browser's machine can reach."""

from __future__ import annotations

import ipaddress
import socket
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from tasks.serve.refusal import Refused
from tasks.serve.settings import ServeSettings

__all__ = ["OriginGuard", "check_json"]

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
            told = f"the host {name[:60]!r} is not a name of this server: ask under its own, or start it with --access.hosts"
            raise Refused(403, told, field="host", code="wrong_host")
        if origin is None or method in CHANGES_NOTHING or "*" in self.origins or origin.lower() in self.origins:
            return
        if urlsplit(origin).netloc.lower() != host.lower():
            told = f"pages of {origin[:60]!r} may not use this server: start it with --access.origins to allow them"
            raise Refused(403, told, field="origin", code="wrong_origin")


def check_json(content_type: str) -> None:
    """Raise Refused unless a body is JSON: other types are what a foreign page can send without being asked."""
    kind = content_type.partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        told = f"the content type is {kind[:60]!r}" if kind else "there is no content type"
        raise Refused(415, f"{told}, expected application/json: send the body as JSON", field="content-type", code="not_json")


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
