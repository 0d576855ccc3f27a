"""The lines of a text that people wrote: one caption, prompt or key a line."""

from __future__ import annotations

import re

__all__ = ["text_lines"]

_END = re.compile("\r\n|\n|\r")


def text_lines(text: str) -> list[str]:
    """The lines that are not blank, without the white space around them.

    A line ends at LF, CR LF or CR alone, as in Python's text files. `str.splitlines` also ends it at what Unicode calls a line boundary
    (vertical tab, form feed, U+0085, U+2028 and others): texts copied from a web page hold these inside a sentence.
    """
    return [stripped for line in _END.split(text) if (stripped := line.strip())]
