"""Messages of the argument parser, made into one sentence."""

from __future__ import annotations

import re

__all__ = ["one_sentence"]

# What jsonargparse says in several lines holds one of these; the first that matches is the sentence.
_TELLING = (
    r"Option '(?P<name>[^']+)' is not accepted",
    r"[Uu]nrecognized arguments: (?P<arguments>.+)",
    r"Validation failed: No action for key \"(?P<key>[^\"]+)\"",
    r"Key '(?P<key2>[^']+)' is not expected",
)


def one_sentence(message: str) -> str:
    """The parser's message without its line breaks, sub-types and values; what a validation of ours said is kept as it is."""
    for pattern in _TELLING:
        if found := re.search(pattern, message):
            return f"there is no setting {next(value for value in found.groups() if value)}"
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    for line in lines:
        # A dataclass of ours that refuses its values says so in a sentence of its own.
        if re.match(r"- .{25,}", line) and "Problem with given" not in line and "Expected a <class" not in line:
            return line[2:]
    return " ".join(lines)[:400]
