"""Keys that requests must carry, where the operator set any."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from fastapi import Request

from adalink.errors import ConfigError
from tasks.serve.refusal import Refused
from tasks.text_lines import text_lines

__all__ = ["Keys"]


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
        # Every key is compared, each in the same time, so that the time tells nothing. Headers are read as latin-1, whatever they are.
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
