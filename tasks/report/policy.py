"""What a page may load: nothing but pictures inside it, and the very style and script that it was written with."""

from __future__ import annotations

import base64
import hashlib

__all__ = ["policy"]


def policy(style: str, script: str = "") -> str:
    """The content security policy of a page with this inline style and script; without a script none may run."""
    scripts = _digest(script) if script else "'none'"
    return f"default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; style-src {_digest(style)}; script-src {scripts}"


def _digest(text: str) -> str:
    """The source expression that lets the browser use this inline text and no other."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
