"""The comments beside the fields of a settings class, as its help on the command line: one place to write and to read them."""

from __future__ import annotations

import inspect
import io
import tokenize
from typing import Any

__all__ = ["comments_as_help"]


def comments_as_help(kind: type[Any]) -> None:
    """Append the field comments of a dataclass to its docstring, in the form that jsonargparse reads."""
    if "Args:" in (kind.__doc__ or ""):
        return
    comments = _comments(inspect.getsource(kind))
    lines = [f"    {name}: {comments[name]}" for name in kind.__dataclass_fields__ if name in comments]
    kind.__doc__ = f"{(kind.__doc__ or '').strip()}\n\nArgs:\n" + "\n".join(lines)


def _comments(source: str) -> dict[str, str]:
    """Field name -> the comment at the end of its line."""
    found: dict[str, str] = {}
    name = ""
    at_start = True
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT):
            at_start = at_start or token.type == tokenize.NEWLINE
        elif token.type == tokenize.NAME and at_start:
            name, at_start = token.string, False
        elif token.type == tokenize.COMMENT and not at_start:
            found[name] = token.string.lstrip("# ")
        else:
            at_start = False
    return found
