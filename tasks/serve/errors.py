"""A request that is refused: a status, a sentence, and the field that it is about, in OpenAI's shape."""

from __future__ import annotations

from typing import Any

__all__ = ["Refused"]


class Refused(Exception):
    """What the client can mend, or should try again later.

    status   400 a wrong value, 401 a key, 403 not allowed, 404 not there, 408 too slow, 409 taken, 413 too large, 429 too many, 503 ending
    field    the place in the request: `messages[0].content[1].image_url.url`; None where it is about the request as a whole
    code     short and stable, for programs
    """

    def __init__(self, status: int, message: str, *, field: str | None = None, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.status = status
        self.field = field
        self.code = code

    @property
    def content(self) -> dict[str, Any]:
        """The body of the answer, as OpenAI's clients read it."""
        kind = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.field, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """What a client needs to know beside the body."""
        again, close = {"Retry-After": "1"}, {"Connection": "close"}  # closed where the body was not read to its end
        return {401: {"WWW-Authenticate": "Bearer"}, 408: close, 413: close, 429: {**again, **close}, 503: again}.get(self.status, {})
