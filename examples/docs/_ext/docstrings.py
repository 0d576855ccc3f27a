"""Docstrings of this project as reStructuredText: they are plain text with `code` and indented blocks, and settings stand beside their fields."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

from sphinx.application import Sphinx

from tasks.runs.help import comments_as_help

_COLUMNS = re.compile(r"(?<=\S) {2,}(?=\S)")
_CODE = re.compile(r"(`[^`]+`)")


def setup(app: Sphinx) -> dict[str, bool]:
    """What Sphinx calls."""
    app.connect("autodoc-process-docstring", _process)
    app.connect("autodoc-process-signature", _signature)
    return {"parallel_read_safe": True}


def _process(app: Sphinx, what: str, name: str, found: Any, options: Any, lines: list[str]) -> None:
    """Change the lines of one docstring in place."""
    if what == "class" and dataclasses.is_dataclass(found):
        comments_as_help(found)  # type: ignore[arg-type]  # a class
        text, _, arguments = (found.__doc__ or "").partition("\nArgs:\n")
        text = inspect.cleandoc(text)
    else:
        text, _, arguments = "\n".join(lines).partition("\nArgs:\n")
    blocks = [_block(block) for block in re.split(r"\n\s*\n", text.strip("\n")) if block.strip()]
    if arguments.strip():
        blocks.append(_fields(arguments))
    lines[:] = "\n\n".join(blocks).splitlines() + [""]


def _signature(app: Sphinx, what: str, name: str, found: Any, options: Any, signature: str | None, returned: str | None) -> tuple[str | None, str | None]:
    """A default that is made anew each time is no Python, and would leave the whole signature unread."""
    return signature and signature.replace("<factory>", "..."), returned


def _block(block: str) -> str:
    """One paragraph: columns (`name   meaning`) as a list, an indented one as it is, else text."""
    lines = block.splitlines()
    if all(line.startswith("    ") for line in lines):
        return ".. code-block:: text\n\n" + block
    if not _COLUMNS.search(lines[0]):
        return _escaped(block)
    items: list[str] = []
    width = min(found.end() for line in lines if not line.startswith(" ") and (found := _COLUMNS.search(line)))
    for line in lines:
        text = _COLUMNS.sub(": ", line.strip())
        if not line.startswith(" "):
            name, meaning = line[:width].strip(), line[width:].strip()
            items.append(f"- ``{name}``: " + _escaped(_COLUMNS.sub(": ", meaning)))
        elif items:
            items[-1] += ("; " if text != line.strip() else " ") + _escaped(text)
    return "\n".join(items)


def _fields(arguments: str) -> str:
    """`name: meaning` lines as a list."""
    found = [line.strip().partition(": ") for line in arguments.splitlines() if line.strip()]
    return "\n".join(f"- ``{name}``: {_escaped(meaning)}" for name, _, meaning in found)


def _escaped(text: str) -> str:
    """Text in which nothing but `code` is markup."""
    parts = _CODE.split(text)
    plain = [part if i % 2 else re.sub(r"([*|\\_])", r"\\\1", part) for i, part in enumerate(parts)]
    return "".join(f"``{part[1:-1]}``" + "\\ " * plain[i + 1][:1].isalnum() if i % 2 else part for i, part in enumerate(plain))
