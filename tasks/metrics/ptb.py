"""Caption words as the Penn Treebank tokenizer of the official caption evaluation makes them."""

from __future__ import annotations

import re

__all__ = ["tokenize"]

_PUNCTUATION = frozenset(["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
_TOKEN = re.compile(r"[^\W_]+(?:[-/&.][^\W_]+)*(?=n't\b)|n't\b|'(?:s|re|ve|ll|d|m)\b|[^\W_]+(?:[-/&.'][^\W_]+)*|\.+|\S")


def tokenize(caption: str) -> list[str]:
    """The words of a caption, lower-cased, without punctuation: ["a", "dog", "'s", "bed"] for "A dog's bed."."""
    text = caption.replace("\n", " ").lower()
    text = re.sub(r"'(s|re|ve|ll|d|m)\b", r" '\1", text)
    return [token for token in _TOKEN.findall(text) if token not in _PUNCTUATION]
